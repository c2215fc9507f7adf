"""What a run or a comparison will do and cost, known before anything starts."""
