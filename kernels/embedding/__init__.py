"""Embedding lookup with task gradients."""
