"""``python -m bench.attention_tiles``: find the fastest settings of the attention kernels.

Every setting of every kernel is timed on a GPU by graph replay, forward or backward as a whole with
one kernel's setting replaced, on four mixes of lengths, in bf16 with dropout.  Tiles take all
sequences while theirs are timed, and runs all short ones while those are.  The table's best rows
are what ``TILES`` in attention_triton.py and ``WARPS`` in attention_runs_triton.py, both in
kernels/attention, should hold.
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
from kernels import attention_plan
from kernels.attention import attention_runs_triton, attention_triton
from kernels.attention.attention_options import AttentionOptions
from kernels.attention.attention_tiles_triton import padded_width
from kernels.attention.attention_triton import Tiles

from . import harness, tile_sweep
from .attention import HEADS, cases

CASES = ("sst x 32", "sst x 256", "cfimdb x 256", "4 x 2048")
SETTINGS: dict[str, list[Tiles] | list[int]] = {
    "forward_runs": [1, 2, 4, 8],  # warps
    "backward_runs": [2, 4, 8],
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
def replaced(
    kernel: str, setting: Tiles | int, width: int, element_bytes: int = 2
) -> Iterator[None]:
    """Let one kernel have this setting: tiles, for sequences of all lengths, or warps."""
    key: dict[tuple[str, int, int], Any] = {(kernel, element_bytes, padded_width(width)): setting}
    if isinstance(setting, int):
        with mock.patch.dict(attention_runs_triton.WARPS, key):
            yield
        return
    with (
        mock.patch.dict(attention_triton.TILES, key),
        mock.patch.dict(attention_triton.LONG_TILES, key),
        mock.patch.dict(attention_runs_triton.WARPS, clear=True),
    ):
        yield


def usual(kernel: str, width: int) -> Tiles | int:
    """The setting that a kernel has."""
    key = (kernel, 2, padded_width(width))
    return attention_runs_triton.WARPS.get(key) or attention_triton.TILES[key]


def text_of(setting: Tiles | int) -> str:
    """A setting in a table."""
    return str(setting) if isinstance(setting, int) else str(tuple(setting))


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
        self._known = {
            "plan": attention_plan(boundaries, len(qkv)),
            "max_seqlen": max(lengths),
        }
        self._grads = tuple(torch.empty_like(qkv).unbind(1))
        self._saved = self.forward()
        self._grad_out = torch.randn_like(self._saved[0])

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        return attention_triton.forward(*self._inputs, *self._others, **self._known)

    def backward(self) -> None:
        """Gradients."""
        saved = (*self._inputs, *self._saved, *self._others)
        attention_triton.backward(self._grad_out, *saved, grads=self._grads, **self._known)


def compile_one(kernel: str, setting: Tiles | int, width: int) -> str:
    """Compile one setting; return what went wrong."""

    def launch() -> None:
        call = Call([20, 70], width)
        call.forward()
        call.backward()
        torch.cuda.synchronize()

    with replaced(kernel, setting, width):
        return tile_sweep.attempt(launch)


def main() -> None:
    """Time all settings, and print a table for each kernel."""
    parser = Parser(prog="python -m bench.attention_tiles", description=__doc__)
    parser.add_argument("--width", type=harness.whole(1, 128), default=64, help="columns of a head")
    options: argparse.Namespace = harness.parse(parser)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device, console, width = torch.device("cuda"), Console(width=110), options.width

    settings = [(kernel, each) for kernel, all_of_it in SETTINGS.items() for each in all_of_it]
    wrong = tile_sweep.broken(compile_one, [(*setting, width) for setting in settings])
    broken = {setting[:2]: text for setting, text in wrong.items()}

    lengths = cases()
    calls = {case: Call(lengths[case], width) for case in CASES}
    results: dict[str, Any] = {"width": width, "broken": {str(k): v for k, v in broken.items()}}
    record = harness.Record(options, "attention_tiles", device)
    for kernel, all_of_it in SETTINGS.items():
        now = text_of(usual(kernel, width))
        seconds: dict[str, dict[str, list[float]]] = {}
        for case, call in calls.items():
            run = call.forward if kernel.startswith("forward") else call.backward
            graphs = {}
            for each in all_of_it:
                if (kernel, each) not in broken:
                    with replaced(kernel, each, width):
                        graphs[text_of(each)] = harness.graph_replay(run, device)
            seconds[case] = harness.device_seconds(graphs, device, rounds=5)
        results[kernel] = {"usual": now, "seconds": seconds}
        record.write(results)
        heading = "warps" if kernel.endswith("runs") else "queries, keys, warps, stages"
        console.print(tile_sweep.table_of(f"{kernel}, us; now {now}", heading, seconds))
    for setting, text in broken.items():
        console.print(f"{setting}: {text}")


if __name__ == "__main__":
    exit_with(main)
