"""Loads ``libsuperbert.so``, the shared library behind the ``superbert::`` operators.

The library registers its operators with torch when it is loaded; it has nothing of CPython, so one
build serves every Python and every torch from 2.11 on.
"""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("libsuperbert.so")

if not _LIBRARY.exists():
    raise ImportError(
        f"{_LIBRARY.name} is not built: run `make setup` at the root of the project",
        name=_LIBRARY.stem,
    )
try:
    torch.ops.load_library(str(_LIBRARY))
except OSError as _error:
    raise ImportError(
        f"{_LIBRARY.name} does not load with torch {torch.__version__}: {_error}; build it on this "
        "machine with this torch, from 2.11 on (docs/install.md)",
        name=_LIBRARY.stem,
    ) from None


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the library was built with this operator for ``"CPU"`` or ``"CUDA"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"superbert::{op}", dispatch_key)
