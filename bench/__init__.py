"""Benchmarks: one for each kernel, one for the step.

Large tensors of all contestants are on huge pages, as the engine's are.
"""

import engine as engine  # before the first tensor
