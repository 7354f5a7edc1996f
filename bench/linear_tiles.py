"""``python -m bench.linear_tiles``: find the fastest tiles of the weight gradients of all tasks.

Every setting of the large tiles is timed on a GPU by graph replay, biases included, on the matrices
of BERT-base's layers, in bf16 and with three tasks.  The table's best row is what ``TILES`` in
kernels/linear/linear_triton.py should hold.
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


@contextmanager
def replaced(tiles: Tiles) -> Iterator[None]:
    """Let large matrices have these tiles."""
    with mock.patch.dict(linear_triton.TILES, {(2, "large"): tiles}):
        yield


def _inputs(shape: tuple[int, int], tokens: int, tasks: int) -> Inputs:
    return Inputs(shape, tokens, tasks, torch.bfloat16, torch.device("cuda"))


def compile_one(tiles: Tiles) -> str:
    """Compile one setting; return what went wrong."""

    def launch() -> None:
        runs(_inputs(SHAPES[0], 100, 3))[OURS]()
        torch.cuda.synchronize()

    with replaced(tiles):
        return tile_sweep.attempt(launch)


def main() -> None:
    """Time all settings, and print a table."""
    parser = Parser(prog="python -m bench.linear_tiles", description=__doc__)
    parser.add_argument("--tokens", type=harness.whole(1), default=2746)
    parser.add_argument("--tasks", type=harness.whole(1), default=3)
    options: argparse.Namespace = harness.parse(parser)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device, console = torch.device("cuda"), Console(width=110)

    wrong = tile_sweep.broken(compile_one, [(tiles,) for tiles in SETTINGS])
    broken = {tiles: text for (tiles,), text in wrong.items()}
    usual = tuple(linear_triton.TILES[2, "large"])
    seconds: dict[str, dict[str, list[float]]] = {}
    results: dict[str, Any] = {"usual": str(usual), "seconds": seconds}
    results["broken"] = {str(tuple(tiles)): text for tiles, text in broken.items()}
    record = harness.Record(options, "linear_tiles", device)
    for shape in SHAPES:
        inputs = _inputs(shape, options.tokens, options.tasks)
        copies = [inputs, *(inputs.another() for _ in range(inputs.copies_beyond_cache() - 1))]
        calls = [runs(each)[OURS] for each in copies]

        def run(calls: list[harness.Contestant] = calls) -> None:
            for call in calls:
                call()

        graphs = {}
        for tiles in SETTINGS:
            if tiles not in broken:
                with replaced(tiles):
                    graphs[str(tuple(tiles))] = harness.graph_replay(run, device)
        samples = harness.device_seconds(graphs, device, rounds=5)
        seconds[str(shape)] = {
            name: [each / len(copies) for each in own] for name, own in samples.items()
        }
        record.write(results)
    heading = "outputs, inputs, tokens, warps, stages"
    console.print(tile_sweep.table_of(f"linear, us; now {usual}", heading, seconds))
    for tiles, text in broken.items():
        console.print(f"{tuple(tiles)}: {text}")


if __name__ == "__main__":
    exit_with(main)
