"""Gram matrices, PCGrad weights, combining, on task gradients."""
