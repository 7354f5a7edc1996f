"""``python -m bench.kernels_once``: launch kernels a few times on real sizes, for a profiler.

    ncu --profile-from-start off --csv python -m bench.kernels_once gram combine attention

Inputs are made and everything is compiled before the profiler starts.  Sizes: task gradients
[3, 110,000,000] and, of attention, 256 sentences of Quora and 64 sequences of 128 tokens, bf16.
"""

import argparse
from collections.abc import Callable

import torch

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import attention, harness, surgery

_COLUMNS = 110_000_000


def surgery_runs(part: str, device: str, columns: int) -> list[Callable[[], object]]:
    """The Gram matrix, or both ways to combine, in fp32 and bf16."""
    updates = [
        surgery.Update(3, columns, dtype, device) for dtype in (torch.float32, torch.bfloat16)
    ]
    if part == "gram":
        return [update.gram for update in updates]
    return [run for update in updates for run in (update.combine, update.combine_adamw)]


def attention_runs(device: str, cases: list[str]) -> list[Callable[[], object]]:
    """Forward and backward of this project's attention."""
    lengths = attention.cases()
    inputs = [attention.Inputs(lengths[case], 64, torch.bfloat16, device) for case in cases]
    return [attention.contestants(each, device)[attention.OURS]() for each in inputs]


def main() -> None:
    """Launch the kernels of the chosen parts."""
    parser = Parser(prog="python -m bench.kernels_once", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=["gram", "combine", "attention"])
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--columns", type=harness.whole(1), default=_COLUMNS, help="parameters")
    parser.add_argument(
        "--case", nargs="+", choices=attention.cases(), metavar="CASE", help="of attention"
    )
    parser.add_argument("--runs", type=harness.whole(1, 100), default=2)
    options: argparse.Namespace = parser.parse_args()
    device = torch.device(options.device)
    for part in options.parts:
        if part == "attention":
            runs = attention_runs(options.device, options.case or ["quora x 256", "64 x 128"])
        else:
            runs = surgery_runs(part, options.device, options.columns)
        for run in runs:
            run()
        harness.synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        for _ in range(options.runs):
            for run in runs:
                run()
        harness.synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        del runs, run


if __name__ == "__main__":
    exit_with(main)
