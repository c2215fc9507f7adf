"""The parts of a recipe, how one is read and drafted, and what is wrong with it."""
