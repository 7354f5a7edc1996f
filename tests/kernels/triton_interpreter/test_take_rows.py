"""The Triton kernels that take rows under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_take_rows() -> None:
    run_cases("take_rows")
