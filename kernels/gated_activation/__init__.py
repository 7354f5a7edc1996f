"""Gated activations of feed-forward networks: GEGLU, SwiGLU, with dropout."""
