"""The Triton kernels under its interpreter, which must be asked for before Triton is loaded.

A file an operator, since several test processes share them file by file.
"""

import os
import subprocess
import sys
from pathlib import Path

from .. import triton_cases


def run_cases(name: str) -> None:
    """Run a file of triton_cases/ in a process of its own."""
    cases = Path(triton_cases.__file__).with_name(f"{name}.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
