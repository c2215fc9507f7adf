"""Carrying out the steps of a plan, by one process or by several, and reading what they left."""
