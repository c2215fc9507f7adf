"""The parts of a recipe, how one is read and drafted, and what its types find wrong."""
