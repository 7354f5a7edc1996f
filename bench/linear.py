"""``python -m bench.linear``: time the weight and bias gradients of linear layers, by task.

The matrices of the layers of BERT-base, on a CPU of MiniLM, too, and three tasks, of equally many
tokens unless ``--shares`` says otherwise.  Peers: torch's product and sum for each task, written to
the same rows, and, as a floor that no task gradients are had for, one product and one sum over all
tokens.

On a CPU that multiplies bf16, the forward pass and the gradient of the input are timed, too, beside
torch's.  What oneDNN compiles for a new number of tokens is in none of its figures.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from kernels.linear.linear import (
    HAS_ONEDNN,
    MULTIPLIES_BF16,
    linear_task_gradients_,
    linear_task_gradients_reference_,
    onednn_linear,
)

from . import harness

SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072))
"""Outputs and inputs: attention's output and input, the two of the feed-forward layer."""
MINILM_SHAPES = ((384, 384), (1152, 384), (1536, 384), (384, 1536))
"""The same of MiniLM, on a CPU."""
OURS, PEER, FLOOR = "this project", "torch, by task", "torch, all tokens"
TORCH, ONEDNN = "torch", "oneDNN, which adds the bias"
FORWARD, GRAD_INPUT, GRADIENTS = "forward", "input gradient", "weight gradients"
Runs = dict[str, Callable[[], object]]


class Inputs:
    """One layer's streams, and rows of a gradient buffer."""

    def __init__(
        self,
        shape: tuple[int, int],
        tokens: int,
        shares: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._arguments = (shape, tokens, shares, dtype, device)
        outputs, inputs = self.shape = shape
        self.weight = torch.randn(shape, device=device).to(dtype)
        self.bias = torch.randn(outputs, device=device).to(dtype)
        self.grad = torch.randn(tokens, outputs, device=device).to(dtype)
        self.x = torch.randn(tokens, inputs, device=device).to(dtype)
        buffer = torch.zeros(len(shares), outputs * (inputs + 1), dtype=dtype, device=device)
        self.rows = buffer[:, : outputs * inputs].unflatten(1, shape)
        self.bias_rows = buffer[:, outputs * inputs :]
        ends = accumulate(shares, initial=0)
        self.offsets = [tokens * end // sum(shares) for end in ends]

    def another(self) -> "Inputs":
        """Inputs of the same shapes elsewhere in memory."""
        return Inputs(*self._arguments)

    @property
    def flops(self) -> int:
        """Operations of the products, in each pass."""
        return 2 * len(self.x) * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the weight gradients read or write at least once."""
        return sum(x.nbytes for x in (self.grad, self.x, self.rows, self.bias_rows))

    def copies_beyond_cache(self, cache_bytes: int = 64 << 20) -> int:
        """Return how many of these are larger than any GPU's cache."""
        return min(16, 1 + cache_bytes // self.nbytes)


def runs(inputs: Inputs) -> Runs:
    """Ours and its peers, for the weight gradients."""
    streams = (inputs.grad, inputs.x)
    arguments = (*streams, inputs.rows, inputs.bias_rows, inputs.offsets, False)

    def all_tokens() -> tuple[Tensor, Tensor]:
        return inputs.grad.t().mm(inputs.x), inputs.grad.sum(0)

    return {
        OURS: lambda: linear_task_gradients_(*arguments),
        PEER: lambda: linear_task_gradients_reference_(*arguments),
        FLOOR: all_tokens,
    }


def products(inputs: Inputs) -> dict[str, Runs]:
    """Ours and its peers for the other passes, where this project has products of its own."""
    x, weight, bias, grad = inputs.x, inputs.weight, inputs.bias, inputs.grad
    if not MULTIPLIES_BF16 or x.is_cuda or x.dtype != torch.bfloat16:
        return {}
    ops = torch.ops.superbert
    forward: Runs = {
        OURS: lambda: ops.linear_bf16(x, weight, bias),
        TORCH: lambda: F.linear(x, weight, bias),
    }
    if HAS_ONEDNN:
        forward[ONEDNN] = lambda: onednn_linear(x, weight, bias)
    grad_input: Runs = {
        OURS: lambda: ops.linear_bf16_grad_input(grad, weight),
        TORCH: lambda: grad.mm(weight),
    }
    return {FORWARD: forward, GRAD_INPUT: grad_input}


def check_close(ours: Tensor, torchs: Tensor) -> None:
    """Check sums of many products that were rounded in another order."""
    tolerance = 64 * torch.finfo(ours.dtype).eps * torchs.abs().max().item()
    torch.testing.assert_close(ours, torchs, rtol=0, atol=tolerance)


def verify(inputs: Inputs) -> None:
    """Check our gradients against torch's before anything is timed."""
    results = []
    for name in (OURS, PEER):
        inputs.rows.fill_(torch.nan)
        inputs.bias_rows.fill_(torch.nan)
        runs(inputs)[name]()
        results.append((inputs.rows.clone(), inputs.bias_rows.clone()))
    for ours, torchs in zip(*results, strict=True):
        check_close(ours, torchs)


def measure(inputs: Inputs, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time the contestants: called by the host, and on a GPU replayed as graphs, too."""
    verify(inputs)
    contestants = runs(inputs)
    samples = harness.interleave(contestants, device, rounds=rounds)
    measured = {
        "flops": inputs.flops,
        "bytes": inputs.nbytes,
        "peak_bytes": {name: harness.peak_memory(run, device) for name, run in contestants.items()},
        "seconds": samples,
        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
    }
    if device.type == "cuda":
        # Each call of a graph has inputs of its own, together more than the cache holds.
        copies = [inputs, *(inputs.another() for _ in range(inputs.copies_beyond_cache() - 1))]
        calls = [runs(each) for each in copies]

        def replay(name: str) -> harness.Contestant:
            return harness.graph_replay(lambda: [made[name]() for made in calls], device)

        graphs = {name: replay(name) for name in contestants}
        replayed = harness.device_seconds(graphs, device, rounds=5, replays=4)
        measured["replayed_seconds"] = {
            name: [each / len(copies) for each in seconds] for name, seconds in replayed.items()
        }
    return measured


def measure_products(inputs: Inputs, rounds: int) -> dict[str, dict[str, Any]]:
    """Time the contestants of the other passes, by the name of the pass."""
    measured: dict[str, dict[str, Any]] = {}
    for name, contestants in products(inputs).items():
        outputs = [torch.as_tensor(run()) for run in contestants.values()]
        for other in outputs[1:]:
            check_close(outputs[0], other)
        samples = harness.interleave(contestants, inputs.x.device, rounds=rounds)
        measured[name] = {
            "flops": inputs.flops,
            "bytes": inputs.x.nbytes + inputs.weight.nbytes + inputs.grad.nbytes,
            "seconds": samples,
            "quantiles": {each: harness.summary(s) for each, s in samples.items()},
        }
    return measured


def add_rows(table: Table, case: str, name: str, measured: dict[str, Any], peak: float) -> None:
    """Add a line for each contestant of a pass; on a GPU of replays."""
    seconds = measured.get("replayed_seconds", measured["seconds"])
    ours = harness.median(seconds[OURS])
    for contestant, own in seconds.items():
        rate = measured["flops"] / harness.median(own)
        table.add_row(
            *((case, name) if contestant == OURS else ("", "")),
            contestant,
            f"{harness.median(own) * 1e6:.1f}",
            f"{rate / 1e12:.3f}",
            f"{rate / peak:.0%}",
            "" if contestant == OURS else f"{harness.median(own) / ours:.2f}x",
        )


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = Parser(prog="python -m bench.linear", description=__doc__)
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=harness.whole(1), default=2746)
    parser.add_argument("--tasks", type=harness.whole(1), default=3, help="of equally many tokens")
    parser.add_argument(
        "--shares",
        nargs="+",
        type=harness.whole(1, 1 << 16),
        metavar="N",
        help="tokens of each task, in proportion, in place of --tasks",
    )
    parser.add_argument("--rounds", type=harness.whole(2), default=20)
    options: argparse.Namespace = harness.parse(parser)
    if torch.device(options.device).type == "cpu":
        kernels.keep_freed_memory()  # as engine.train does; it serves the peers, too
    device, console = torch.device(options.device), Console(width=110)

    shares = options.shares or [1] * options.tasks
    shapes = SHAPES if device.type == "cuda" else (*SHAPES, *MINILM_SHAPES)
    results: dict[str, Any] = {"tokens": options.tokens, "tasks": len(shares), "shares": shares}
    record = harness.Record(options, "linear", device)
    for dtype_name in options.dtype:
        dtype = harness.DTYPES[dtype_name]
        peak = harness.measure_gemm(device, dtype, options.tokens, 3072, 768)
        results[f"gemm_flops_per_s, {dtype_name}"] = peak
        table = Table(title=f"linear layers, {len(shares)} tasks, {dtype_name}")
        for heading in ("O, I", "pass", "contestant", "us", "TFLOP/s", "of GEMM", "ours is"):
            is_text = heading in ("pass", "contestant")
            table.add_column(heading, justify="left" if is_text else "right")
        for shape in shapes:
            case = f"{shape[0]}, {shape[1]}"
            inputs = Inputs(shape, options.tokens, shares, dtype, device)
            passes = measure_products(inputs, options.rounds)
            for name, measured in passes.items():
                results[f"{case}, {dtype_name}, {name}"] = measured
            results[f"{case}, {dtype_name}"] = measure(inputs, device, options.rounds)
            for name, measured in {**passes, GRADIENTS: results[f"{case}, {dtype_name}"]}.items():
                add_rows(table, case, name, measured, peak)
            record.write(results)
        console.print(table)


if __name__ == "__main__":
    exit_with(main)
