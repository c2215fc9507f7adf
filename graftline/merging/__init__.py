"""Merge rules: two or more backbones in, one out."""
