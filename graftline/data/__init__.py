"""Sources, splits and validation of the data."""
