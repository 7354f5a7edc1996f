"""Files, errors and text: what knows nothing of training."""
