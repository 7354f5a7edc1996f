"""The Triton kernels of embeddings with a layer norm under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_embedding_layer_norm() -> None:
    run_cases("embedding_layer_norm")
