"""Task gradients of several ranks: each case runs on 2 or 4 gloo processes."""
