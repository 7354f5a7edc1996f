"""Ranks, and the gradients and weights that they exchange."""
