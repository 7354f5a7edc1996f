"""``python -m bench.gated_activation``: time GEGLU and SwiGLU, forward and backward.

GELU by erf, with dropout behind, by tanh, and SiLU.  Called by the host, and on a GPU replayed as
a graph, too.  The floor is the bytes that must move at the copy bandwidth of the same rounds: x and
the output, then the output's gradient, x and its gradient.  Peers: plain torch (chunk, activation,
product), the same compiled by `torch.compile`, and on a GPU Liger where it imports, which takes
the halves apart and has GELU by tanh alone.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import harness

_DROPOUT = 0.1
OURS = "this project"
Function = Callable[[Tensor], Tensor]
Run = Callable[[], object]


class Inputs:
    """Rows ``[T, 2 I]`` and the gradient of the output."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
        self.x = torch.randn(rows, 2 * width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(rows, width, device=device).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that a forward and a backward pass must move: 8 of ``[T, I]``."""
        return 8 * self.grad.nbytes

    def another(self) -> "Inputs":
        """Inputs of the same shape elsewhere in memory."""
        return Inputs(*self.grad.shape, self.x.dtype, str(self.x.device))

    def copies_beyond_cache(self, cache_bytes: int = 64 << 20) -> int:
        """Return how many of these are larger than any GPU's cache."""
        return min(16, 1 + cache_bytes // self.x.nbytes)

    def run(self, function: Function) -> Run:
        """Forward and backward."""
        return lambda: torch.autograd.grad(function(self.x), self.x, self.grad)


def _plain(activate: Function, p: float = 0.0) -> Function:
    def gated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        out = activate(a) * b
        return functional.dropout(out, p) if p else out

    return gated


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _dropped(x: Tensor) -> Tensor:
    return kernels.geglu(x, dropout_p=_DROPOUT)


def _geglu_tanh(x: Tensor) -> Tensor:
    return kernels.geglu(x, approximate="tanh")


# This project's function, plain torch's, and the name of Liger's module and function.
KINDS: dict[str, tuple[Function, Function, tuple[str, str] | None]] = {
    "geglu": (kernels.geglu, _plain(functional.gelu), None),
    "geglu, dropout": (_dropped, _plain(functional.gelu, _DROPOUT), None),
    "geglu by tanh": (_geglu_tanh, _plain(_gelu_tanh), ("geglu", "LigerGELUMulFunction")),
    "swiglu": (kernels.swiglu, _plain(functional.silu), ("swiglu", "LigerSiLUMulFunction")),
}


def functions(kind: str, device: str) -> dict[str, Function]:
    """This project's function and its peers, by name."""
    ours, plain, liger = KINDS[kind]
    found = {OURS: ours, "torch": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    if liger is not None and device == "cuda" and importlib.util.find_spec("liger_kernel"):
        module, name = liger
        function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
        found["Liger"] = lambda x: function.apply(*x.chunk(2, -1))
    return found


def verify(inputs: Inputs, kind: str) -> None:
    """Check a function and its gradient against torch's before anything is timed."""
    ours, plain, _ = KINDS[kind]
    if "dropout" in kind:  # whose masks differ
        return
    results = []
    for function in (ours, plain):
        out = function(inputs.x)
        results.append((out, *torch.autograd.grad(out, inputs.x, inputs.grad)))
    for found, expected in zip(*results, strict=True):
        tolerance = 8 * torch.finfo(found.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def measure(
    kind: str, inputs: Inputs, options: argparse.Namespace, failures: dict[str, str], case: str
) -> dict[str, Any]:
    """Time one case's contestants: called by the host, and on a GPU replayed as graphs, too."""
    torch._dynamo.reset()
    device, failed = torch.device(options.device), dict[str, str]()
    made = functions(kind, device.type)
    runs = harness.surviving(
        {name: lambda f=function: inputs.run(f) for name, function in made.items()}, failed
    )
    if OURS not in runs:
        raise SystemExit(f"{case}: {failed[OURS]}")
    samples = harness.interleave(runs, device, rounds=options.rounds)
    measured = {
        "bytes": inputs.nbytes,
        "peak_bytes": {name: harness.peak_memory(run, device) for name, run in runs.items()},
        "seconds": samples,
        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
    }
    if device.type == "cuda":
        # Each call of a graph has inputs of its own, together more than the cache holds.
        copies = [inputs, *(inputs.another() for _ in range(inputs.copies_beyond_cache() - 1))]

        def replay(name: str) -> harness.Contestant:
            calls = [each.run(made[name]) for each in copies]
            return harness.graph_replay(lambda: [call() for call in calls], device)

        graphs = harness.surviving({name: lambda name=name: replay(name) for name in runs}, failed)
        replayed = harness.device_seconds(graphs, device, rounds=5, replays=4)
        measured["replayed_seconds"] = {
            name: [each / len(copies) for each in seconds] for name, seconds in replayed.items()
        }
    failures.update({f"{name}, {case}": text for name, text in failed.items()})
    return measured


def _rows(case: str, measured: dict[str, Any], copy: float) -> Iterator[list[str]]:
    ours = harness.median(measured["seconds"][OURS])
    for name, seconds in measured["seconds"].items():
        called = harness.median(seconds)
        best = harness.median(measured.get("replayed_seconds", {}).get(name, seconds))
        yield [
            case if name == OURS else "",
            name,
            f"{called * 1e3:.3f}",
            f"{best * 1e3:.4f}",
            f"{measured['bytes'] / best / copy:.0%}",
            f"{measured['peak_bytes'][name] / 2**20:.0f}",
            "" if name == OURS else f"{called / ours:.2f}x",
        ]


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = Parser(prog="python -m bench.gated_activation", description=__doc__)
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=harness.whole(1), default=[1000, 8192])
    parser.add_argument("--width", nargs="+", type=harness.whole(1), default=[1152])
    parser.add_argument("--rounds", type=harness.whole(2), default=20)
    options = harness.parse(parser)
    device, console = torch.device(options.device), Console(width=110)

    results: dict[str, Any] = {"failures": {}}
    record = harness.Record(options, "gated_activation", device)
    for dtype_name in options.dtype:
        copy = harness.measure_bandwidth(device)["copy"]
        results[f"copy_bytes_per_s, {dtype_name}"] = copy
        table = Table(title=f"gated activations forward + backward, {dtype_name}")
        headings = ["shape", "contestant", "ms", "replayed ms", "of copy", "peak MiB", "ours is"]
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for rows, width, kind in itertools.product(options.rows, options.width, KINDS):
            inputs = Inputs(rows, width, harness.DTYPES[dtype_name], options.device)
            verify(inputs, kind)
            case = f"[{rows}, {width}] {kind}"
            name = f"{case}, {dtype_name}"
            results[name] = measured = measure(kind, inputs, options, results["failures"], name)
            record.write(results)
            for cells in _rows(case, measured, copy):
                table.add_row(*cells)
        console.print(table)
    if results["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    exit_with(main)
