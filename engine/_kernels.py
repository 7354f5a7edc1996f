"""Import the kernels package under either of its names.

In the repository the packages stand at the top (``engine``, ``kernels``); installed they are
``superbert.engine`` and ``superbert.kernels``, so that they never shadow Hugging Face's library
``kernels``.  Either way both have the same parent, and inside a package every import is relative.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import kernels
else:
    kernels = import_module(__package__.removesuffix("engine") + "kernels")

__all__ = ["kernels"]
