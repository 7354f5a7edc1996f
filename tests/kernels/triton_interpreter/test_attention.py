"""Attention's Triton kernels under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_attention() -> None:
    run_cases("attention")
