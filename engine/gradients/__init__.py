"""Task gradients: flat storage, parameter groups, balancing."""
