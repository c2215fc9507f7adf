"""Carrying out the steps of a plan, by one process or by several, and which code computes each."""
