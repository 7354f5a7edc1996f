"""A training engine for one BERT shared by several tasks."""

import os

__version__ = "0.1.0"

# torch reads this at its first tensor: those of 2 MiB and more then lie on huge pages where Linux
# gives them to who asks.  Surgery and update read all gradients and weights in every step, and on
# small pages they wait for the addresses.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
