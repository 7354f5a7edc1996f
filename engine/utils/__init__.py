"""Files, errors and text, independent of training."""
