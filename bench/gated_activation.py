"""``python -m bench.gated_activation``: time GEGLU and SwiGLU, forward and backward.

GELU by erf, with dropout behind, by tanh, and SiLU.  The floor: x and the output, then the output's
gradient, x and its gradient.  Peers: plain torch (chunk, activation, product), the same compiled by
`torch.compile`, and on a GPU Liger where it imports, which takes the halves apart and has GELU by
tanh alone.
"""

import argparse
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from engine.cli.standard_output import exit_with

from . import harness, memory_bound
from .memory_bound import OURS, Case, Runs

_DROPOUT = 0.1
Function = Callable[[Tensor], Tensor]


class Inputs:
    """Rows ``[T, 2 I]`` and the gradient of the output."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
        self.x = torch.randn(rows, 2 * width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(rows, width, device=device).to(dtype)

    def run(self, function: Function) -> harness.Contestant:
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


def cases(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of a dtype."""
    for rows, width, kind in itertools.product(options.rows, options.width, KINDS):
        sizes = (rows, width, dtype, options.device)
        inputs = Inputs(*sizes)
        verify(inputs, kind)

        def make(kind: str = kind, sizes: tuple[int, int, torch.dtype, str] = sizes) -> Runs:
            own, device = Inputs(*sizes), torch.device(options.device).type
            return {name: own.run(function) for name, function in functions(kind, device).items()}

        # Eight of [T, I].
        yield Case(f"[{rows}, {width}] {kind}", 8 * inputs.grad.nbytes, inputs.x.nbytes, make)


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = memory_bound.parser("gated_activation", __doc__)
    parser.add_argument("--rows", nargs="+", type=harness.whole(1), default=[1000, 8192])
    parser.add_argument("--width", nargs="+", type=harness.whole(1), default=[1152])
    options = harness.parse(parser)
    title = "gated activations forward + backward"
    memory_bound.run("gated_activation", title, options, lambda dtype: cases(options, dtype))


if __name__ == "__main__":
    exit_with(main)
