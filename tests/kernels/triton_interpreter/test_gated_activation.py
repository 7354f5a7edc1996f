"""The Triton kernels of gated activations under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_gated_activation() -> None:
    run_cases("gated_activation")
