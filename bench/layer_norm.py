"""``python -m bench.layer_norm``: time layer norm, alone and fused with BERT's layers around it.

Plain; RMS norm; dropout + residual + norm; the same as a pre-norm, whose sum goes on, too;
embedding sum + norm + dropout.  Forward and backward with the gradients of all parameters.  Peers,
each where it imports: torch's norms, the plain code compiled by `torch.compile`, Liger, apex,
flash-attn's Triton norm.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from engine.cli.standard_output import exit_with

from . import harness, memory_bound
from .memory_bound import OURS, Case, Runs

_EPS = 1e-12
_DROPOUT = 0.1
_TABLE_ROWS = (30_522, 512, 2)  # bert-base's words, positions and token types
Run = harness.Contestant


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
        self.ids = [torch.randint(0, count, (rows,), device=device) for count in _TABLE_ROWS]
        self.tables = [tensor(count, width).requires_grad_() for count in _TABLE_ROWS]

    def plain(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        """``norm(x)``, forward and backward."""
        leaves = (self.x, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, self.grad)

    def fused(self, norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Run:
        """``norm(residual + dropout(x))``, forward and backward."""
        leaves = (self.x, self.residual, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, self.grad)

    def rms(self, norm: Callable[[Tensor, Tensor], Tensor]) -> Run:
        """``norm(x)`` without a bias, forward and backward."""
        leaves = (self.x, self.weight)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, self.grad)

    def before_norm(self, norm: Callable[..., tuple[Tensor, Tensor]]) -> Run:
        """``norm(total)`` and ``total = residual + dropout(x)``, forward and backward of both."""
        leaves = (self.x, self.residual, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*leaves), leaves, (self.grad, self.grad))

    def embedded(self, norm: Callable[..., Tensor]) -> Run:
        """``dropout(norm(word + position + token type))``, forward and backward."""
        leaves = (*self.tables, self.weight, self.bias)
        return lambda: torch.autograd.grad(norm(*self.ids, *leaves), leaves, self.grad)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, _EPS)


def _torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _torch_norm(residual + F.dropout(x, _DROPOUT), weight, bias)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, _EPS)


def _torch_prenorm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, _DROPOUT)
    return _torch_norm(total, weight, bias), total


def _torch_embedding_norm(
    word_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    total = F.embedding(word_ids, word) + F.embedding(position_ids, position)
    total = total + F.embedding(token_type_ids, token_type)
    return F.dropout(_torch_norm(total, weight, bias), _DROPOUT)


def plain_runs(inputs: Inputs, device: str) -> dict[str, Run]:
    """Layer norm alone."""
    runs = {
        OURS: inputs.plain(lambda x, w, b: kernels.layer_norm(x, w, b, _EPS)),
        "torch": inputs.plain(_torch_norm),
    }
    runs["torch.compile"] = inputs.plain(torch.compile(_torch_norm, dynamic=False))
    if device == "cuda":
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


def rms_runs(inputs: Inputs, _device: str) -> dict[str, Run]:
    """RMS norm alone."""
    return {
        OURS: inputs.rms(lambda x, w: kernels.rms_norm(x, w, _EPS)),
        "torch": inputs.rms(_torch_rms_norm),
        "torch.compile": inputs.rms(torch.compile(_torch_rms_norm, dynamic=False)),
    }


def prenorm_runs(inputs: Inputs, _device: str) -> dict[str, Run]:
    """A pre-norm behind a residual, which goes on."""

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.dropout_add_layer_norm(
            *(x, residual, weight, bias, _DROPOUT, _EPS), prenorm=True, seed=inputs.seed
        )

    return {
        OURS: inputs.before_norm(ours),
        "torch": inputs.before_norm(_torch_prenorm),
        "torch.compile": inputs.before_norm(torch.compile(_torch_prenorm, dynamic=False)),
    }


def fused_runs(inputs: Inputs, device: str) -> dict[str, Run]:
    """BERT's post-norm."""

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.dropout_add_layer_norm(
            *(x, residual, weight, bias, _DROPOUT, _EPS), seed=inputs.seed
        )

    runs = {OURS: inputs.fused(ours), "torch": inputs.fused(_torch_add_norm)}
    runs["torch.compile"] = inputs.fused(torch.compile(_torch_add_norm, dynamic=False))
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        def flash_attn(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return layer_norm_fn(x, weight, bias, residual, eps=_EPS, dropout_p=_DROPOUT)

        runs["flash-attn"] = inputs.fused(flash_attn)
    return runs


def embedding_runs(inputs: Inputs, _device: str) -> dict[str, Run]:
    """BERT's embedding layer."""

    def ours(*tensors: Tensor) -> Tensor:
        return kernels.embedding_layer_norm(
            *tensors, dropout_p=_DROPOUT, eps=_EPS, seed=inputs.seed
        )

    compiled = torch.compile(_torch_embedding_norm, dynamic=False)
    return {
        OURS: inputs.embedded(ours),
        "torch": inputs.embedded(_torch_embedding_norm),
        "torch.compile": inputs.embedded(compiled),
    }


def verify(inputs: Inputs) -> None:
    """Check the norms and their gradients against torch's before anything is timed."""
    for make in (plain_runs, rms_runs):
        runs = make(inputs, "cpu")
        for ours, torchs in zip(runs[OURS](), runs["torch"](), strict=True):
            # A weight's gradient is a sum over all rows, rounded in another order.
            tolerance = 64 * torch.finfo(ours.dtype).eps * torchs.abs().max().item()
            torch.testing.assert_close(ours, torchs, rtol=0, atol=tolerance)


# What to run, how many [rows, width] tensors must move, and how often all tables must.
_KINDS = {
    "plain": (plain_runs, 5, 0),  # x, y; dy, x, dx
    "RMS": (rms_runs, 5, 0),  # the same
    "prenorm": (prenorm_runs, 9, 0),  # x, residual, h, y; dy, dh, h, dx, dresidual
    "fused": (fused_runs, 8, 0),  # x, residual, h, y; dy, h, dx, dresidual
    "embedding": (embedding_runs, 8, 1),  # three rows, y; dy, three rows
}


def cases(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of a dtype."""
    on_gpu = torch.device(options.device).type == "cuda"
    row_counts = options.rows or ([2560, 32768] if on_gpu else [2560])
    for rows, width in itertools.product(row_counts, options.width):
        sizes = (rows, width, dtype, options.device)
        inputs = Inputs(*sizes)
        verify(inputs)
        for kind, (make_runs, tensors, tables) in _KINDS.items():
            # The tables' gradients are written whole, and the rows that were looked up read.
            nbytes = tensors * inputs.x.nbytes + tables * sum(t.nbytes for t in inputs.tables)

            def make(
                make_runs: Callable[[Inputs, str], Runs] = make_runs,
                sizes: tuple[int, int, torch.dtype, str] = sizes,
            ) -> Runs:
                return make_runs(Inputs(*sizes), torch.device(options.device).type)

            yield Case(f"[{rows}, {width}] {kind}", nbytes, 3 * inputs.x.nbytes, make)


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = memory_bound.parser("layer_norm", __doc__)
    parser.add_argument("--rows", nargs="+", type=harness.whole(1), default=None)
    parser.add_argument("--width", nargs="+", type=harness.whole(1), default=[384, 768, 1024])
    options = harness.parse(parser)
    title = "norms forward + backward"
    memory_bound.run("layer_norm", title, options, lambda dtype: cases(options, dtype))


if __name__ == "__main__":
    exit_with(main)
