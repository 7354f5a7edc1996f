"""Find settings of a recipe that have no effect."""
