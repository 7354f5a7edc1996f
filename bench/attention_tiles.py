"""``python -m bench.attention_tiles``: find the fastest tiles of the attention kernels.

Every setting of every kernel is timed on a GPU by graph replay, forward or backward as a whole with
one kernel's setting replaced, on four mixes of lengths, in bf16 with dropout.  The table's best
rows are what ``TILES`` in kernels/attention/attention_triton.py should hold.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from kernels.attention import attention_triton
from kernels.attention.attention_options import AttentionOptions
from kernels.attention.attention_triton import Tiles

from . import harness, tile_sweep
from .attention import HEADS, cases

CASES = ("sst x 32", "sst x 256", "cfimdb x 256", "4 x 2048")
SETTINGS = {
    "forward": [
        *(Tiles(16, 32, 1, 2), Tiles(32, 32, 2, 2), Tiles(32, 32, 4, 2), Tiles(32, 64, 4, 2)),
        *(Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 2)),
        *(Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2)),
    ],
    "grad_q": [
        *(Tiles(16, 32, 2, 2), Tiles(32, 32, 2, 2), Tiles(32, 32, 4, 2), Tiles(32, 64, 4, 2)),
        *(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)),
        *(Tiles(64, 64, 8, 2), Tiles(64, 128, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 64, 8, 2)),
    ],
    "grad_kv": [
        *(Tiles(32, 16, 2, 2), Tiles(32, 32, 2, 2), Tiles(32, 32, 4, 2), Tiles(16, 64, 4, 2)),
        *(Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)),
        *(Tiles(64, 64, 8, 2), Tiles(16, 128, 4, 2), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2)),
    ],
}


@contextmanager
def replaced(kernel: str, tiles: Tiles, width: int, element_bytes: int = 2) -> Iterator[None]:
    """Let one kernel have these tiles, for sequences of all lengths."""
    key = {(kernel, element_bytes, attention_triton.padded_width(width)): tiles}
    with (
        mock.patch.dict(attention_triton.TILES, key),
        mock.patch.dict(attention_triton.LONG_TILES, key),
    ):
        yield


class Call:
    """One case's attention, forward and backward, without autograd."""

    def __init__(self, lengths: list[int], width: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        shape = (sum(lengths), 3, HEADS, width)
        qkv = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda").int()
        seed = torch.tensor(5, device="cuda")
        options = AttentionOptions(width**-0.5, dropout_p=0.1, rng_offset=1, seed=seed)
        self._inputs = (*qkv.unbind(1),)
        self._others = (boundaries, boundaries, options)
        self._grads = tuple(torch.empty_like(qkv).unbind(1))
        self._saved = self.forward()
        self._grad_out = torch.randn_like(self._saved[0])

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        return attention_triton.forward(*self._inputs, *self._others)

    def backward(self) -> None:
        """Gradients."""
        saved = (*self._inputs, *self._saved, *self._others)
        attention_triton.backward(self._grad_out, *saved, grads=self._grads)


def compile_one(kernel: str, tiles: Tiles, width: int) -> str:
    """Compile one setting; return what went wrong."""

    def launch() -> None:
        call = Call([20, 70], width)
        call.forward()
        call.backward()
        torch.cuda.synchronize()

    with replaced(kernel, tiles, width):
        return tile_sweep.attempt(launch)


def main() -> None:
    """Time all settings, and print a table for each kernel."""
    parser = Parser(prog="python -m bench.attention_tiles", description=__doc__)
    parser.add_argument("--width", type=harness.whole(1, 128), default=64, help="columns of a head")
    options: argparse.Namespace = harness.parse(parser)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device, console, width = torch.device("cuda"), Console(width=110), options.width

    settings = [(kernel, tiles) for kernel, all_tiles in SETTINGS.items() for tiles in all_tiles]
    wrong = tile_sweep.broken(compile_one, [(*setting, width) for setting in settings])
    broken = {setting[:2]: text for setting, text in wrong.items()}

    lengths = cases()
    calls = {case: Call(lengths[case], width) for case in CASES}
    results: dict[str, Any] = {"width": width, "broken": {str(k): v for k, v in broken.items()}}
    record = harness.Record(options, "attention_tiles", device)
    for kernel, all_tiles in SETTINGS.items():
        usual = attention_triton.TILES[kernel, 2, attention_triton.padded_width(width)]
        seconds: dict[str, dict[str, list[float]]] = {}
        for case, call in calls.items():
            run = call.forward if kernel == "forward" else call.backward
            graphs = {}
            for each in all_tiles:
                if (kernel, each) not in broken:
                    with replaced(kernel, each, width):
                        graphs[str(tuple(each))] = harness.graph_replay(run, device)
            seconds[case] = harness.device_seconds(graphs, device, rounds=5)
        results[kernel] = {"usual": str(tuple(usual)), "seconds": seconds}
        record.write(results)
        title, heading = f"{kernel}, us; now {tuple(usual)}", "queries, keys, warps, stages"
        console.print(tile_sweep.table_of(title, heading, seconds))
    for setting, text in broken.items():
        console.print(f"{setting}: {text}")


if __name__ == "__main__":
    exit_with(main)
