"""Layer norm's Triton kernels under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_layer_norm() -> None:
    run_cases("layer_norm")
