"""``python -m bench.linear_tiles``: find the fastest tiles of the weight gradients of all tasks.

Every setting of the large tiles is timed on a GPU by graph replay, biases included, on the matrices
of BERT-base's layers, in bf16 and with three tasks.  At the end it prints the line of ``TILES`` in
kernels/linear/linear_triton.py as it is and as it should be.  What ``--seconds`` do not suffice for
is named as not measured; the current setting comes first.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from kernels.linear import linear_triton
from kernels.linear.linear_triton import Tiles

from . import harness, tile_sweep
from .linear import OURS, SHAPES, Inputs, runs

SETTINGS = [
    *(Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4)),
    *(Tiles(128, 128, 64, 4, 4), Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 128, 8, 2)),
    *(Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 4), Tiles(256, 128, 64, 8, 3)),
    *(Tiles(128, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4), Tiles(64, 256, 64, 4, 3)),
]


KEY = (2, "large")


@contextmanager
def replaced(tiles: Tiles) -> Iterator[None]:
    """Let large matrices have these tiles."""
    with mock.patch.dict(linear_triton.TILES, {KEY: tiles}):
        yield


def _inputs(shape: tuple[int, int], tokens: int, tasks: int) -> Inputs:
    return Inputs(shape, tokens, [1] * tasks, torch.bfloat16, torch.device("cuda"))


def compile_one(tiles: Tiles) -> str:
    """Compile one setting; return what went wrong."""

    def launch() -> None:
        runs(_inputs(SHAPES[0], 100, 3))[OURS]()
        torch.cuda.synchronize()

    with replaced(tiles):
        return tile_sweep.attempt(launch)


def main() -> int:
    """Time all settings; print a table, and the line to paste."""
    parser = Parser(prog="python -m bench.linear_tiles", description=__doc__)
    parser.add_argument("--tokens", type=harness.whole(1), default=2746)
    parser.add_argument("--tasks", type=harness.whole(1), default=3)
    parser.add_argument(
        "--seconds", type=harness.whole(1), default=30, help="to compile and measure in"
    )
    options: argparse.Namespace = harness.parse(parser)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device, console = torch.device("cuda"), Console(width=110)
    budget = tile_sweep.Budget(options.seconds)

    usual = linear_triton.TILES[KEY]
    settings = list(dict.fromkeys([usual, *SETTINGS]))
    compiled = tile_sweep.compile_all(compile_one, [(tiles,) for tiles in settings], budget)
    broken = {tile_sweep.text_of(tiles): text for (tiles,), text in compiled.broken.items()}
    # What all others are compared with is measured even if it has to be compiled then.
    too_late = [tiles for (tiles,) in compiled.late if tiles != usual]
    late = [tile_sweep.text_of(tiles) for tiles in too_late]
    own = [each for each in settings if (each,) not in compiled.broken and each not in too_late]
    seconds: dict[str, dict[str, list[float]]] = {}
    results: dict[str, Any] = {
        "usual": tile_sweep.text_of(usual),
        "seconds": seconds,
        "broken": broken,
        "not_measured": late,
    }
    record = harness.Record(options, "linear_tiles", device)
    for number, shape in enumerate(SHAPES):
        inputs = _inputs(shape, options.tokens, options.tasks)
        copies = [inputs, *(inputs.another() for _ in range(inputs.copies_beyond_cache() - 1))]
        calls = [runs(each)[OURS] for each in copies]

        def run(calls: list[harness.Contestant] = calls) -> None:
            for call in calls:
                call()

        share = budget.share(min(1, 2 / (len(SHAPES) - number)))  # the first one takes longer
        samples, missing = tile_sweep.measure(run, own, replaced, device, share)
        late += [f"{tile_sweep.text_of(each)} in {shape}" for each in missing]
        seconds[str(shape)] = {
            name: [each / len(copies) for each in times] for name, times in samples.items()
        }
        record.write(results)
    name = "kernels/linear/linear_triton.py TILES"
    found = tile_sweep.Choice(name, KEY, usual, tile_sweep.fastest(settings, usual, seconds))
    results["to_paste"] = tile_sweep.report([found]).splitlines()
    record.write(results)
    heading = "outputs, inputs, tokens, warps, stages"
    now = tile_sweep.text_of(usual)
    console.print(tile_sweep.table_of(f"linear, us; now {now}", heading, seconds))
    return tile_sweep.print_end(broken, late, budget, [found])


if __name__ == "__main__":
    exit_with(main)
