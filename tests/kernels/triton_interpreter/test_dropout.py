"""Dropout's Triton kernel under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_dropout() -> None:
    run_cases("dropout")
