"""Benchmarks: one for each kernel, one for the step.

Large tensors of all contestants lie on huge pages, as the engine's do.
"""

import engine as engine  # before the first tensor
