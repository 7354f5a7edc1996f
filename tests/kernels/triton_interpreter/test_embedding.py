"""The Triton kernels of embeddings' gradients under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_embedding() -> None:
    run_cases("embedding")
