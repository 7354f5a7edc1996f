"""Start processes of a distributed run: by themselves, or by torchrun's agents."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .conftest import REPOSITORY


def start_ranks(
    ranks: int, arguments: Sequence[str], log: Path, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start ``python -m ARGUMENTS`` on so many ranks, as torchrun does, without its agent.

    What they print goes to the file ``log``.
    """
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        _start(arguments, log, shared | environment | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(ranks))
    ]


def torchrun(arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start torchrun's agent; what it and its workers print goes to ``log``."""
    return _start(["torch.distributed.run", *arguments], log, environment)


def on_two_machines(
    arguments: Sequence[str], logs: Sequence[Path], restarts: int = 0, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start the agents of two machines, which have an address of the loopback device each.

    Each starts one worker; the first serves the rendezvous.
    """
    options = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", f"--max-restarts={restarts}"]
    options += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=run"]
    hosts = ("is_host=1", "is_host=0")
    return [
        torchrun(
            [*options, f"--rdzv-conf={host}", f"--local-addr=127.0.0.{number}", *arguments],
            log,
            **environment,
        )
        for number, (host, log) in enumerate(zip(hosts, logs, strict=True), 1)
    ]


def free_port() -> str:
    """Return a port of the loopback device that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _start(arguments: Sequence[str], log: Path, own: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
            stdout=output,
            stderr=output,
        )
