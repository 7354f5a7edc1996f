"""Metrics of training steps: collected, written as JSON lines, sent to loggers."""
