"""The Triton kernels under its interpreter, which must be asked for before Triton is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_triton_kernels_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
