"""What a run or a comparison will do and cost, and what is wrong with it, before it starts."""
