"""``python -m bench.attention_tiles``: find the fastest settings of the attention kernels.

Every setting of every kernel is timed on a GPU by graph replay, forward or backward as a whole with
one kernel's setting replaced, on four mixes of lengths, in bf16 with dropout.  Tiles take all
sequences while theirs are timed, and runs all short ones while those are.  At the end it prints the
lines of ``TILES`` and ``LONG_TILES`` in attention_triton.py and of ``WARPS`` in
attention_runs_triton.py, both in kernels/attention, as they are and as they should be.

Settings are compiled beforehand, in processes of their own.  What ``--seconds`` do not suffice for
is named as not measured; each kernel's current setting comes first.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from kernels import attention_plan
from kernels.attention import attention_runs_triton, attention_triton
from kernels.attention.attention_options import AttentionOptions
from kernels.attention.attention_plan import SURELY_SHORT
from kernels.attention.attention_tiles_triton import padded_width
from kernels.attention.attention_triton import LONG, Tiles

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


def candidates(kernel: str, width: int) -> list[Any]:
    """The settings to try: those that the kernel has, and the list."""
    key = (kernel, 2, padded_width(width))
    tables = (attention_runs_triton.WARPS, attention_triton.TILES, attention_triton.LONG_TILES)
    own = [table[key] for table in tables if key in table]
    return list(dict.fromkeys([*own, *SETTINGS[kernel]]))


def choices(
    kernel: str, width: int, seconds: tile_sweep.Samples, lengths: dict[str, list[int]]
) -> list[tile_sweep.Choice]:
    """The lines of a kernel in its tables, and what was found for them.

    Each is chosen by the cases that it serves: runs by those with short sequences, tiles by those
    whose mean length chooses the table.
    """
    key = (kernel, 2, padded_width(width))
    settings = candidates(kernel, width)

    def chosen(table: str, usual: Any, cases: list[str]) -> tile_sweep.Choice:
        own = {case: seconds.get(case, {}) for case in cases}
        found = tile_sweep.fastest(settings, usual, own)
        return tile_sweep.Choice(f"kernels/attention/{table}", key, usual, found)

    if kernel.endswith("runs"):
        usual = attention_runs_triton.WARPS[key]
        short = [case for case, own in lengths.items() if min(own) <= SURELY_SHORT]
        return [chosen("attention_runs_triton.py WARPS", usual, short)]
    is_long = {case: sum(own) > LONG * len(own) for case, own in lengths.items()}
    file, usual = "attention_triton.py", attention_triton.TILES[key]
    short = [case for case in lengths if not is_long[case]]
    tiles = chosen(f"{file} TILES", usual, short)
    usual = attention_triton.LONG_TILES.get(key, usual)
    long = chosen(f"{file} LONG_TILES", usual, [case for case in lengths if is_long[case]])
    if key in attention_triton.LONG_TILES:
        return [tiles, long]
    # A line of its own where another setting than all lengths' is faster.
    is_other = (
        long.found is not None and tiles.found is not None and long.found[0] != tiles.found[0]
    )
    return [tiles, *([long._replace(usual=None)] if is_other else [])]


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


class _Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, _grid: object) -> Any:
        return lambda *_arguments, **_constants: None


_KERNELS = {
    **dict.fromkeys(("forward_runs", "backward_runs"), attention_runs_triton),
    **dict.fromkeys(("forward", "grad_q", "grad_kv"), attention_triton),
}


def compile_one(kernel: str, setting: Tiles | int, width: int) -> str:
    """Compile one setting, and no other kernel; return what went wrong."""

    def launch() -> None:
        with ExitStack() as stack:
            for name, module in _KERNELS.items():
                if name != kernel:
                    stack.enter_context(mock.patch.object(module, f"{name}_kernel", _Nothing()))
            call = Call([20, 70], width)
            call.forward()
            call.backward()
            torch.cuda.synchronize()

    with replaced(kernel, setting, width):
        return tile_sweep.attempt(launch)


def main() -> int:
    """Time all settings; print a table for each kernel, and the lines to paste."""
    parser = Parser(prog="python -m bench.attention_tiles", description=__doc__)
    parser.add_argument("--width", type=harness.whole(1, 128), default=64, help="columns of a head")
    parser.add_argument(
        "--seconds", type=harness.whole(1), default=40, help="to compile and measure in"
    )
    options: argparse.Namespace = harness.parse(parser)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device, console, width = torch.device("cuda"), Console(width=110), options.width
    budget = tile_sweep.Budget(options.seconds)

    # The first of each kernel, then the second: what is late is not all of one kernel.
    tried = {kernel: candidates(kernel, width) for kernel in SETTINGS}
    tries = [
        (kernel, own[place])
        for place in range(max(map(len, tried.values())))
        for kernel, own in tried.items()
        if place < len(own)
    ]
    arguments = [(*setting, width) for setting in tries]
    compiled = tile_sweep.compile_all(compile_one, arguments, budget)
    # What all others are compared with is measured even if it has to be compiled then.
    usual = [(kernel, own[0], width) for kernel, own in tried.items()]
    too_late = [each for each in compiled.late if each not in usual]
    late = [f"{kernel} {tile_sweep.text_of(each)}" for kernel, each, _ in too_late]
    left_out = {setting[:2] for setting in (*compiled.broken, *too_late)}
    broken = {
        f"{kernel} {tile_sweep.text_of(each)}": text
        for (kernel, each, _), text in compiled.broken.items()
    }

    all_lengths = cases()
    lengths = {case: all_lengths[case] for case in CASES}
    calls = {case: Call(own, width) for case, own in lengths.items()}
    results: dict[str, Any] = {"width": width, "broken": broken, "not_measured": late}
    record = harness.Record(options, "attention_tiles", device)
    found: list[tile_sweep.Choice] = []
    to_come = len(SETTINGS) * len(calls)
    for kernel, settings in tried.items():
        own = [each for each in settings if (kernel, each) not in left_out]
        seconds: dict[str, dict[str, list[float]]] = {}
        for case, call in calls.items():
            run = call.forward if kernel.startswith("forward") else call.backward
            seconds[case], missing = tile_sweep.measure(
                run,
                own,
                lambda each, kernel=kernel: replaced(kernel, each, width),
                device,
                budget.share(min(1, 2 / to_come)),  # the first ones take longer
            )
            to_come -= 1
            late += [f"{kernel} {tile_sweep.text_of(each)} in {case}" for each in missing]
        lines = choices(kernel, width, seconds, lengths)
        found += lines
        now = " and ".join(tile_sweep.text_of(each.usual) for each in lines if each.usual)
        results[kernel] = {"usual": now, "seconds": seconds}
        heading = "warps" if kernel.endswith("runs") else "queries, keys, warps, stages"
        console.print(tile_sweep.table_of(f"{kernel}, us; now {now}", heading, seconds))
        results["to_paste"] = tile_sweep.report(found).splitlines()
        record.write(results)
    return tile_sweep.print_end(broken, late, budget, found)


if __name__ == "__main__":
    exit_with(main)
