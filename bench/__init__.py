"""Benchmarks: one for each kernel, one for the step."""
