"""``python -m bench.layer_norm``: layer norm, and dropout + residual + norm, beside their peers.

Forward and backward with gradients of weight and bias.  The floor is the bytes that must move at
the copy bandwidth of the same rounds.  Peers, each where it imports: torch's layer norm, the plain
code compiled by `torch.compile`, Liger, apex.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import kernels

from . import harness

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EPS = 1e-12
_DROPOUT = 0.1
Run = Callable[[], object]


class Inputs:
    """Rows, parameters and the gradient of the output."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.x = tensor(rows, width).requires_grad_()
        self.residual = tensor(rows, width).requires_grad_()
        self.grad = tensor(rows, width)
        self.weight, self.bias = tensor(width).requires_grad_(), tensor(width).requires_grad_()
        self.seed = torch.tensor(0, device=device)

    def plain(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        """``norm(x)``, forward and backward."""
        leaves = (self.x, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, self.grad)

    def fused(self, norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Run:
        """``norm(residual + dropout(x))``, forward and backward."""
        leaves = (self.x, self.residual, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, self.grad)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, _EPS)


def _torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _torch_norm(residual + F.dropout(x, _DROPOUT), weight, bias)


def plain_runs(inputs: Inputs, device: str) -> dict[str, Run]:
    """Layer norm alone."""
    runs = {
        "this project": inputs.plain(lambda x, w, b: kernels.layer_norm(x, w, b, _EPS)),
        "torch": inputs.plain(_torch_norm),
    }
    if device == "cuda":
        runs["torch.compile"] = inputs.plain(torch.compile(_torch_norm))
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            runs["Liger"] = inputs.plain(
                lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, _EPS)
            )
        if importlib.util.find_spec("apex"):
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            runs["apex"] = inputs.plain(
                lambda x, w, b: fused_layer_norm_affine(x, w, b, x.shape[-1:], _EPS)
            )
    return runs


def fused_runs(inputs: Inputs, device: str) -> dict[str, Run]:
    """BERT's post-norm."""

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.dropout_add_layer_norm(
            *(x, residual, weight, bias), dropout_p=_DROPOUT, eps=_EPS, seed=inputs.seed
        )

    runs = {"this project": inputs.fused(ours), "torch": inputs.fused(_torch_add_norm)}
    if device == "cuda":
        runs["torch.compile"] = inputs.fused(torch.compile(_torch_add_norm))
    return runs


def verify(inputs: Inputs) -> None:
    """Check the norm and its gradients against torch's before anything is timed."""
    runs = plain_runs(inputs, "cpu")
    for ours, torchs in zip(runs["this project"](), runs["torch"](), strict=True):
        # A weight's gradient is a sum over all rows, rounded in another order.
        tolerance = 64 * torch.finfo(ours.dtype).eps * torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=0, atol=tolerance)


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m bench.layer_norm", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=None)
    parser.add_argument("--width", nargs="+", type=int, default=[384, 768, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write raw samples and environment here")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console(width=110)
    row_counts = options.rows or ([2560] if device.type == "cpu" else [2560, 32768])

    results: dict[str, object] = {}
    for dtype_name in options.dtype:
        copy = harness.measure_bandwidth(device)["copy"]
        table = Table(title=f"layer norm forward + backward, {dtype_name}")
        for heading in ("shape", "contestant", "ms", "GB/s", "of copy", "ours is"):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for rows in row_counts:
            for width in options.width:
                inputs = Inputs(rows, width, _DTYPES[dtype_name], options.device)
                verify(inputs)
                # Plain: x, y; dy, x, dx.  Fused: x, residual, h, y; dy, h, dx, dresidual.
                for kind, make, tensors in (("plain", plain_runs, 5), ("fused", fused_runs, 8)):
                    nbytes = tensors * inputs.x.nbytes
                    samples = harness.interleave(
                        make(inputs, options.device), device, rounds=options.rounds
                    )
                    ours = harness.median(samples["this project"])
                    for name, seconds in samples.items():
                        rate = nbytes / harness.median(seconds)
                        table.add_row(
                            f"[{rows}, {width}] {kind}" if name == "this project" else "",
                            name,
                            f"{harness.median(seconds) * 1e3:.3f}",
                            f"{rate / 1e9:.1f}",
                            f"{rate / copy:.0%}",
                            ""
                            if name == "this project"
                            else f"{harness.median(seconds) / ours:.2f}x",
                        )
                    results[f"[{rows}, {width}] {kind}, {dtype_name}"] = {
                        "bytes": nbytes,
                        "seconds": samples,
                        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
                    }
        results[f"copy_bytes_per_s, {dtype_name}"] = copy
        console.print(table)
    if options.json:
        harness.write_record(options.json, "layer_norm", device, results)


if __name__ == "__main__":
    main()
