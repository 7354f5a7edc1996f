"""Dropout whose mask follows from a seed (Philox)."""
