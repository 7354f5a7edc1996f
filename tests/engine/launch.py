"""Make runs of the engine on several ranks.

As a program (``python -m tests.engine.launch``) it is one rank: it goes through the runs that it
is given, one after the other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.cli.common import run_cli
from engine.train import main

from ..launch import start_ranks


def start(
    ranks: int,
    runs: Sequence[Sequence[Any]],
    log: Path,
    program: str = "tests.engine.launch",
    **environment: str,
) -> list[subprocess.Popen[bytes]]:
    """Start ``ranks`` processes that make each of the runs together: the arguments of the program.

    What they print goes to the file ``log``.  ``program`` is a module that is given the runs, too.
    """
    return start_ranks(ranks, [program, json.dumps(runs)], log, **environment)


def launch(ranks: int, runs: Sequence[Sequence[str]], log: Path) -> None:
    """Make the runs on ``ranks`` processes; fail with what they printed if one fails."""
    statuses = [process.wait(timeout=300) for process in start(ranks, runs, log)]
    assert statuses == [0] * ranks, log.read_text()


def _be_a_rank() -> int:
    status = 0
    for number, arguments in enumerate(json.loads(sys.argv[1])):
        if number:  # each run opens a store of its own
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        status = status or main(arguments)
    return status


if __name__ == "__main__":
    run_cli(_be_a_rank)
