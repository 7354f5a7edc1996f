"""Time the checks of arguments: nanoseconds of a call on tensors with next to no work.

``python -m bench.argument_checks [OTHER_LIBRARY ...]`` prints the best of many rounds for each
operator; with the libraries of other commits beside it, in processes of their own, taking turns.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import harness

OWN = str(Path(__file__).parents[1] / "kernels" / "libsuperbert.so")
ROUNDS = 7


def measure(library: str) -> dict[str, float]:
    """Return the nanoseconds of :mod:`.operator_calls`, measured in a process of its own.

    Raises:
        ValueError: the library cannot be loaded, or has other operators.
    """
    command = [sys.executable, "-m", "bench.operator_calls", library]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.split("\n")
        why = next((line for line in reversed(lines) if line.strip()), f"{process.returncode}")
        raise ValueError(f"{library}: its operators cannot be called: {why}")
    found: dict[str, float] = json.loads(process.stdout)
    return found


def main() -> None:
    """Print the table."""
    parser = Parser(prog="python -m bench.argument_checks", description=__doc__)
    parser.add_argument("libraries", nargs="*", type=_library, metavar="OTHER_LIBRARY")
    options = harness.parse(parser)
    best: dict[str, dict[str, float]] = {library: {} for library in (OWN, *options.libraries)}
    for _ in range(ROUNDS):
        for library, fewest in best.items():
            try:
                found = measure(library)
            except ValueError as error:
                parser.error(str(error))
            for name, nanoseconds in found.items():
                fewest[name] = min(nanoseconds, fewest.get(name, nanoseconds))
    for name in best[OWN]:
        print(f"{name:22}", *(f"{fewest[name]:9,.0f} ns" for fewest in best.values()))
    if options.json is not None:
        results = {Path(OWN).name if library == OWN else library: best[library] for library in best}
        cpu = torch.device("cpu")
        harness.write_record(options.json, "argument_checks", cpu, results, replace=options.force)


def _library(text: str) -> str:
    """Return the path of a library of operators.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the library of another build, a file")
    return str(Path(text).resolve())


if __name__ == "__main__":
    exit_with(main)
