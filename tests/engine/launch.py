"""Start the ranks of a run as ``torchrun`` does, without its agent.

As a program (``python -m tests.engine.launch``) it is one rank: it goes through the runs that it
is given, one after the other.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.cli.common import run_cli
from engine.train import main

REPOSITORY = Path(__file__).parents[2]


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", program, json.dumps(runs)]
        with log.open("ab") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    env=os.environ | own | environment,
                    stdout=output,
                    stderr=output,
                )
            )
    return processes


def torchrun(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun's agent, each of its workers with one thread; what they print goes to log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )


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
