"""Training: one loop, and the three ways to call it."""
