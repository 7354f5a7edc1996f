"""What surrounds the step: device and precision, run folders, checkpoints, metrics."""
