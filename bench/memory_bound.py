"""Time kernels that move much memory and compute little, beside their peers.

``bench.layer_norm``, ``bench.rotary`` and ``bench.gated_activation`` make the cases.  Contestants
are called by the host, and on a GPU replayed as a graph, too, which is what counts in a recorded
step.  The floor of a case is the bytes that must move, at the copy bandwidth of the same rounds.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernels
from engine.cli.common import Parser

from . import harness

OURS = "this project"
Runs = Mapping[str, harness.Contestant]
_CACHE_BYTES = 64 << 20
"""Larger than any GPU's cache."""


@dataclass(frozen=True)
class Case:
    """One input, and what is to be done with it.

    Attributes:
        name: of the table's line.
        nbytes: what must move.
        input_bytes: of the input.
        make: returns contestants by name, this project's first, with an input of their own.
    """

    name: str
    nbytes: int
    input_bytes: int
    make: Callable[[], Runs]


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, with the options that all have."""
    made = Parser(prog=f"python -m bench.{module}", description=description)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=harness.device, default=usual)
    made.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    made.add_argument("--rounds", type=harness.whole(2), default=20)
    return made


def run(
    module: str,
    title: str,
    options: argparse.Namespace,
    cases: Callable[[torch.dtype], Iterable[Case]],
) -> None:
    """Time all cases, print a table for each dtype, and keep the record.

    Args:
        module: the benchmark's name.
        title: of the tables.
        options: of :func:`parser`, parsed.
        cases: what to time in a dtype.

    Raises:
        SystemExit: a contestant failed.
    """
    device, console = torch.device(options.device), Console(width=120)
    if device.type == "cpu":
        kernels.keep_freed_memory()  # as engine.train does; it serves the peers, too
    results: dict[str, Any] = {"failures": {}}
    record = harness.Record(options, module, device)
    for dtype_name in options.dtype:
        copy = harness.measure_bandwidth(device)["copy"]
        results[f"copy_bytes_per_s, {dtype_name}"] = copy
        table = Table(title=f"{title}, {dtype_name}")
        headings = ["case", "contestant", "ms", "GB/s", "of copy", "peak MiB", "ours is"]
        for heading in [*headings, *(["replayed ms", "ours is"] if device.type == "cuda" else [])]:
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for case in cases(harness.DTYPES[dtype_name]):
            name = f"{case.name}, {dtype_name}"
            measured = measure(case, device, options.rounds, results["failures"], name)
            results[name] = measured
            record.write(results)
            for cells in _rows(case.name, measured, copy):
                table.add_row(*cells)
        console.print(table)
    if results["failures"]:
        raise SystemExit(1)


def measure(
    case: Case, device: torch.device, rounds: int, failures: dict[str, str], name: str
) -> dict[str, Any]:
    """Time the contestants of a case; peers that fail are named in ``failures``.

    Raises:
        SystemExit: this project's own failed.
    """
    torch._dynamo.reset()  # compilations of one case don't count against another's limit
    failed: dict[str, str] = {}
    made = case.make()
    runs = harness.surviving({name: lambda run=run: run for name, run in made.items()}, failed)
    if OURS not in runs:
        raise SystemExit(f"{name}: {failed[OURS]}")
    samples = harness.interleave(runs, device, rounds=rounds)
    measured = {
        "bytes": case.nbytes,
        "peak_bytes": {name: harness.peak_memory(run, device) for name, run in runs.items()},
        "seconds": samples,
        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
    }
    if device.type == "cuda":
        # Each call of a graph has inputs of its own, together more than the cache holds.
        count = min(16, 1 + _CACHE_BYTES // case.input_bytes)
        calls = [made, *(case.make() for _ in range(count - 1))]

        def replay(name: str) -> harness.Contestant:
            return harness.graph_replay(lambda: [each[name]() for each in calls], device)

        graphs = harness.surviving({name: lambda name=name: replay(name) for name in runs}, failed)
        replayed = harness.device_seconds(graphs, device, rounds=5, replays=4)
        measured["replayed_seconds"] = {
            name: [each / count for each in seconds] for name, seconds in replayed.items()
        }
    failures.update({f"{contestant}, {name}": text for contestant, text in failed.items()})
    return measured


def _rows(case: str, measured: dict[str, Any], copy: float) -> Iterator[list[str]]:
    """Yield the lines of a case; bandwidth is that of replays, where there are any."""
    replayed = measured.get("replayed_seconds", {})
    ours = harness.median(measured["seconds"][OURS])
    for name, seconds in measured["seconds"].items():
        best = harness.median(replayed.get(name, seconds))
        cells = [
            case if name == OURS else "",
            name,
            f"{harness.median(seconds) * 1e3:.3f}",
            f"{measured['bytes'] / best / 1e9:.1f}",
            f"{measured['bytes'] / best / copy:.0%}",
            f"{measured['peak_bytes'][name] / 2**20:.0f}",
            "" if name == OURS else f"{harness.median(seconds) / ours:.2f}x",
        ]
        if name in replayed:
            cells.append(f"{best * 1e3:.4f}")
            if name != OURS and OURS in replayed:
                cells.append(f"{best / harness.median(replayed[OURS]):.2f}x")
        yield cells
