"""``python -m tests.robustness``: the whole report; exit status 1 where it shows a problem."""

import argparse
import functools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.harness import parse, write_record
from engine.utils.json_text import dump_json

from .base import Base
from .compare import compare_ranks
from .concurrent import try_concurrent
from .disk import fill_disk
from .endurance import endure
from .files import try_files
from .fuzz import fuzz
from .kills import kill_runs
from .loops import check_loops
from .operators import try_operators
from .options import try_options
from .outputs import try_outputs
from .progress import say
from .scaling import check_scaling
from .sequences import try_sequences
from .settings import try_settings

Part = Callable[[Path, argparse.Namespace], dict[str, Any]]

_RAW = ("allowed", "differences", "samples", "problems")

CASES = {
    "outputs": (try_outputs, 700, "commands that write, with something at or around their output"),
    "sequences": (try_sequences, 100, "sequences of commands, killed and corrupted between"),
    "settings": (try_settings, 2000, "fields of a recipe at the edges of their types, then pairs"),
    "options": (try_options, 300, "command lines at the edges, and stdout and stderr that fail"),
    "concurrent": (try_concurrent, 40, "pairs of processes on one folder"),
    "files": (
        try_files,
        500,
        "tokenizers, weights, records, data sets corrupted in their structure",
    ),
    "operators": (try_operators, 500, "children that call operators with wrong arguments"),
}
"""Parts made of cases that repeat by themselves: what tries them, how many, what they are."""


def _of_cases(name: str) -> Part:
    attempt, _, _ = CASES[name]
    return lambda folder, options: attempt(
        _base(folder.parent), folder, getattr(options, name), options.seed, options.case
    )


@functools.cache
def _base(folder: Path) -> Base:
    return Base.make(folder / "base")


PARTS: dict[str, Part] = {
    "fuzz": lambda folder, options: fuzz(folder, options.inputs, options.seed),
    **{name: _of_cases(name) for name in CASES},
    "disk": lambda folder, options: fill_disk(folder, options.full_disks, options.seed),
    "ranks": lambda folder, options: compare_ranks(folder, options.steps),
    "scaling": lambda folder, options: check_scaling(folder, options.scaling_steps),
    "kills": lambda folder, options: kill_runs(folder, options.kills, options.seed),
    "loops": lambda folder, options: check_loops(folder, options.seed),
    "endurance": lambda folder, options: endure(folder, options.endurance_steps),
}


def report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the parts of the report, each in a folder of its own."""
    results: dict[str, Any] = {"seed": options.seed}
    for name in options.only or PARTS:
        (folder / name).mkdir()
        begun, worked = time.monotonic(), _cpu_seconds()
        results[name] = PARTS[name](folder / name, options)
        results[name]["seconds"] = round(time.monotonic() - begun, 1)
        results[name]["cpu_seconds"] = round(_cpu_seconds() - worked, 1)
        say(f"{name}: done in {results[name]['seconds']} s")
    results["problems"] = list(problems(results))
    return results


def problems(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be, a line each."""
    yield from results.get("fuzz", {}).get("unhandled", [])
    for name in CASES:
        yield from results.get(name, {}).get("problems", [])
    yield from (f"disk: {problem}" for problem in results.get("disk", {}).get("problems", []))
    for name in results.get("kills", {}).get("different", []):
        yield f"kills: {name} ended otherwise"
    yield from (f"loops: {problem}" for problem in results.get("loops", {}).get("problems", []))
    ranks = results.get("ranks", {})
    for name in ranks.get("not_repeated", []):
        yield f"ranks: {name} gave other bits again"
    for name, share in ranks.get("of_allowed", {}).items():
        if share > 1:
            yield f"ranks: {name} differs by {share:.2f} times what is allowed"
    for name, run in results.get("scaling", {}).get("runs", {}).items():
        if not 2 / 3 < run["predicted_over_measured"] < 3 / 2:
            yield f"scaling: {name} takes {run['measured']} s, not {run['predicted']} s"
    if "endurance" in results:
        yield from _growth(results["endurance"])


def _growth(measured: dict[str, Any]) -> Iterator[str]:
    # Allocators settle for a while: a twentieth; handles and threads must not grow at all.
    for what, room in {"resident_mib": 1.05, "open_files": 1.0, "threads": 1.0}.items():
        course = measured[what]
        if course["at_the_end"] > room * course["after_a_tenth"]:
            yield f"endurance: {what} grew: {course}"
    pieces = measured["log_pieces_mib"]
    # A piece is put aside after the block of lines that makes it too long.
    if len(pieces) > measured["keep_logs"] + 1 or max(pieces.values()) > 1.1 * measured["log_mib"]:
        yield f"endurance: the log's pieces: {pieces}"


def _cpu_seconds() -> float:
    """Return the processor time of this process and all that have ended before it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__)
    add = parser.add_argument
    add("--inputs", type=int, default=10_000, help="corrupted inputs")
    for name, (_, count, what) in CASES.items():
        add(f"--{name}", type=int, default=count, metavar="N", help=f"{what} (default: {count})")
    add("--full-disks", type=int, default=50, help="runs that a full disk stops")
    add("--steps", type=int, default=100, help="of the runs on 1, 2 and 4 ranks")
    add("--scaling-steps", type=int, default=15, help="of each measurement against the arithmetic")
    add("--kills", type=int, default=50)
    add("--endurance-steps", type=int, default=10_000)
    add("--seed", type=int, default=0)
    add("--only", nargs="+", choices=list(PARTS), help="default: all parts")
    add("--case", type=int, metavar="N", help="of a part with cases: that one alone, told whole")
    options = parse(parser)
    if options.case is not None and not (options.only and set(options.only) <= CASES.keys()):
        parser.error(f"--case: name its part with --only, one of {', '.join(CASES)}")
    torch.set_num_threads(1)  # as the processes that this one starts
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["SUPERBERT_CACHE"] = str(Path(folder) / "cache")
        results = report(options, Path(folder))
    if options.json is not None:
        write_record(options.json, "faults", torch.device("cpu"), results, replace=options.force)
    print(dump_json({name: _brief(part) for name, part in results.items()}, indent=1))
    return 1 if results["problems"] else 0


def _brief(part: Any) -> Any:
    """Leave out the raw figures, which are for the record."""
    if not isinstance(part, dict):
        return part
    return {name: value for name, value in part.items() if name not in _RAW}


if __name__ == "__main__":
    sys.exit(main())
