"""Runs: a folder with a recipe, its data, models, scores; series of runs."""
