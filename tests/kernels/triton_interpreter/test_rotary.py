"""Rotary embedding's Triton kernel under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_rotary() -> None:
    run_cases("rotary")
