"""Linear layers' Triton kernels under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_linear() -> None:
    run_cases("linear")
