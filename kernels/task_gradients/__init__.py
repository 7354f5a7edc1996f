"""Task gradients of any torch model from one backward pass."""
