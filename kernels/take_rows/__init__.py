"""Rows of a matrix, each taken once at most."""
