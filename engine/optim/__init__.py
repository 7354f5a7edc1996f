"""Optimizers on flat parameters, learning-rate schedule, loss scale."""
