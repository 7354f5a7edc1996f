"""Recipes: fields, defaults, checks, messages."""
