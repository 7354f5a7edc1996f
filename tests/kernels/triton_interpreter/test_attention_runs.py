"""Attention's Triton kernels for runs under the interpreter."""

import pytest

from . import run_cases


@pytest.mark.long
def test_attention_runs() -> None:
    run_cases("attention_runs")
