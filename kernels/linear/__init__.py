"""Linear layers that write task gradients."""
