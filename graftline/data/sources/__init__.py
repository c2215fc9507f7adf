"""Own data by recipe: every source becomes the same rows, checked one by one."""
