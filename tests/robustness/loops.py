"""Faults of ranks in people's own distributed loops: what a user sees, and after which time.

Each loop of ``loop_program.py`` runs on two processes under torchrun, of one machine or of two
(agents with an address of the loopback device each), and meets a fault at a random step:

    nothing          the weights are to the bit those of one machine
    restarted        ``kill -9`` of a worker with ``--max-restarts``: the same bits
    killed           ``kill -9`` of a worker: all others end, with status 1 and a line that says why
    stopped          ``kill -STOP`` of a worker: likewise, after the process group's timeout; the
                     agent of two that serves the rendezvous may wait for its own for ever
    machine lost     ``kill -9`` of an agent and its worker: likewise
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..launch import on_two_machines, torchrun
from .children import wait_until
from .kills import children
from .loop_program import LOOPS
from .progress import say

TIMEOUT = 10
"""Seconds that a process waits for another one in an exchange."""
FAULTS = {
    "nothing": (1, 2),
    "restarted": (1, 2),
    "killed": (1, 2),
    "stopped": (1, 2),
    "machine lost": (2,),
}
"""On how many machines each fault is tried."""

_STEPS = 40
_LIMIT = 120.0  # seconds in which all must end: the timeout, torchrun's 30 for a stopped worker
_SAID = re.compile(
    r"rank \d of 2: no answer from another rank.*"  # this project's
    r"|\[\S*gloo/transport\S*\] (?:Timed out|Connection closed|Read error).*"  # of other exchanges
    r"|Signal \d+ \(SIG[A-Z]+\) received by PID \d+"  # torchrun's of a worker
)
# Else torchrun's workers find the addresses of those before a restart in its store, and end.
_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def check_loops(
    folder: Path, seed: int, loops: Collection[str] = LOOPS, faults: Collection[str] = FAULTS
) -> dict[str, Any]:
    """Try faults in loops.

    Args:
        folder: for what the loops write.
        seed: decides the moments and victims.
        loops: names of :data:`.loop_program.LOOPS`.
        faults: names of :data:`FAULTS`; each loop meets nothing first.

    Returns:
        ``cases``: by name the agents' exit statuses, the ``seconds`` from the fault until
        all ended, and what those that went on ``said``; and ``problems``.
    """
    draw = random.Random(seed)
    cases: dict[str, Any] = {}
    problems = []
    for loop in loops:
        whole = None
        for fault in ("nothing", *(fault for fault in faults if fault != "nothing")):
            for machines in FAULTS[fault]:
                name = f"{loop}, {fault}, {machines} machine{'s' * (machines - 1)}"
                say(f"loops: {name}")
                with contextlib.closing(_Case(folder / name, loop, fault, machines)) as case:
                    cases[name] = case.run(draw)
                whole = case.bits() if whole is None else whole
                problems += [f"{name}: {problem}" for problem in case.problems(whole)]
    return {"timeout": TIMEOUT, "cases": cases, "problems": problems}


class _Case:
    """One loop and its fault."""

    def __init__(self, folder: Path, loop: str, fault: str, machines: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._loop, self._fault = folder, loop, fault
        self._logs = [folder / f"log-{number}" for number in range(machines)]
        self._agents = self._start()
        self._workers: set[int] = set()
        self._survivors = list(range(machines))
        self._ended_in_time = True

    def _start(self) -> list[subprocess.Popen[bytes]]:
        machines = len(self._logs)
        program = ["-m", "tests.robustness.loop_program", self._loop, str(self._folder)]
        program += [f"--steps={_STEPS}", f"--timeout={TIMEOUT}", f"--machines={machines}"]
        restarts = 2 if self._fault == "restarted" else 0
        if machines == 2:
            return on_two_machines(program, self._logs, restarts, **_ENVIRONMENT)
        options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        return [torchrun([*options, *program], self._logs[0], **_ENVIRONMENT)]

    def run(self, draw: random.Random) -> dict[str, Any]:
        """Let the fault happen, and wait until all have ended."""
        begun = time.monotonic()
        step = 0
        if self._fault != "nothing":
            wanted = draw.randrange(1, _STEPS // 2)  # seconds before the end
            wait_until(lambda: self._step() >= wanted or self._has_ended(), _LIMIT)
            step, begun = self._step(), time.monotonic()
            self._strike(draw)
        wait_until(lambda: self._note_workers() or self._has_ended(), _LIMIT)
        self._ended_in_time = self._has_ended()
        seconds = time.monotonic() - begun
        return {
            **({"step": step} if step else {}),
            "statuses": [agent.poll() for agent in self._agents],
            "seconds": round(seconds, 1),
            "said": self._said(),
        }

    def _strike(self, draw: random.Random) -> None:
        number = draw.randrange(len(self._agents))
        victim = draw.choice(children(self._agents[number].pid))
        self._note_workers()
        os.kill(victim, signal.SIGSTOP if self._fault == "stopped" else signal.SIGKILL)
        if self._fault == "machine lost":
            self._agents[number].kill()
        if len(self._agents) == 2 and self._fault in ("stopped", "machine lost"):
            self._survivors.remove(number)

    def _step(self) -> int:
        try:
            return int((self._folder / "step").read_text() or 0)
        except FileNotFoundError:
            return 0

    def _has_ended(self) -> bool:
        return all(self._agents[number].poll() is not None for number in self._survivors)

    def _note_workers(self) -> None:
        for agent in self._agents:
            if agent.poll() is None:
                self._workers.update(children(agent.pid))

    def _said(self) -> list[str]:
        texts = [self._logs[number].read_text(errors="replace") for number in self._survivors]
        return sorted({found[0] for text in texts for found in _SAID.finditer(text)})

    def bits(self) -> list[str]:
        """Return the weights of all ranks, as they wrote them."""
        return [file.read_text() for file in sorted(self._folder.glob("rank-*.json"))]

    def problems(self, whole: list[str]) -> Iterator[str]:
        """Yield what is not as it must be; ``whole`` are the bits of a run without a fault."""
        statuses = {self._agents[number].poll() for number in self._survivors}
        if not self._ended_in_time:
            yield f"did not end within {_LIMIT:.0f} s"
        elif self._fault in ("nothing", "restarted"):
            if statuses != {0}:
                yield f"statuses {statuses}: {self._logs[0].read_text()[-2000:]}"
            elif self.bits() != whole or len(set(whole)) != 1:
                yield "its weights are others"
        elif statuses != {1}:
            yield f"statuses {statuses}"
        elif not self._said():
            yield f"nothing says why: {self._logs[self._survivors[0]].read_text()[-2000:]}"
        left = [worker for worker in self._workers if Path(f"/proc/{worker}").exists()]
        if all(agent.poll() is not None for agent in self._agents) and left:
            yield f"processes are left: {left}"

    def close(self) -> None:
        """End all that still runs."""
        self._note_workers()
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        for agent in self._agents:
            agent.kill()
            agent.wait()
