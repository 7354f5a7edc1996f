"""Training: the step, the trainer around it, its failures."""
