"""A training engine for one BERT shared by several tasks."""

import os

__version__ = "0.1.0"

# torch reads this once, at the first tensor, which other modules make as they are imported.
# Tensors of 2 MiB and more are then on huge pages, where Linux gives them to programs that ask: a
# step reads all gradients and weights, and on small pages waits for their addresses.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
