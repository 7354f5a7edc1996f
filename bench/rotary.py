"""``python -m bench.rotary``: time the rotation of queries and keys by their positions.

Packed ``qkv [T, 3, H, D]``, positions given, forward, and backward alone.  Ours overwrites qkv.
The floor: forward q and k, read and written; backward the gradient of qkv.  Peers, each where it
imports: the torch operations of transformers' ModernBERT, which make new queries and keys, alone
and compiled by `torch.compile`; on a GPU flash-attn's Triton kernel, in place too, and Liger's.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kernels
from engine.cli.standard_output import exit_with

from . import harness, memory_bound
from .memory_bound import OURS, Case, Runs

_SEQUENCE = 512  # positions of a packed stream repeat
Sizes = tuple[int, int, int, torch.dtype, str]
"""Arguments of :class:`Inputs`."""
Rotate = Callable[[Tensor, "Inputs"], tuple[Tensor, ...]]
"""Returns tensors that together hold all heads of qkv, rotated, in their order."""


class Inputs:
    """Queries, keys and values, their gradient, tables and positions."""

    def __init__(self, tokens: int, heads: int, width: int, dtype: torch.dtype, device: str):
        self.qkv, self.grad = (
            torch.randn(tokens, 3, heads, width, device=device).to(dtype) for _ in range(2)
        )
        self.ids = torch.arange(tokens, device=device) % _SEQUENCE
        self.cos, self.sin = kernels.rotary_tables(_SEQUENCE, width, device=device)
        self.tables = self.cos.to(dtype), self.sin.to(dtype)  # flash-attn's are of x's dtype
        angles = torch.cat((self.cos, self.cos), -1), torch.cat((self.sin, self.sin), -1)
        self.whole_cos, self.whole_sin = (table[self.ids] for table in angles)
        lengths = range(0, tokens + _SEQUENCE, _SEQUENCE)
        bounds = [min(length, tokens) for length in lengths]
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

    def forward(self, rotate: Rotate) -> harness.Contestant:
        """Rotate without a graph."""
        return lambda: rotate(self.qkv, self)

    def backward(self, rotate: Rotate) -> harness.Contestant:
        """Return what computes the gradient of qkv, over and over, from one forward pass."""
        qkv = self.qkv.clone().requires_grad_()
        tokens, *_, width = qkv.shape
        outputs = [x.reshape(tokens, -1, width) for x in rotate(qkv.clone(), self)]
        parts = self.grad.view(tokens, -1, width).split([x.shape[1] for x in outputs], 1)
        return lambda: torch.autograd.grad(outputs, qkv, parts, retain_graph=True)


def _ours(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return (kernels.apply_rotary_emb_qkv_(qkv, inputs.cos, inputs.sin, position_ids=inputs.ids),)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _torch(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """As transformers' ModernBERT does it."""
    cos, sin = inputs.whole_cos[:, None], inputs.whole_sin[:, None]
    q, k, v = qkv.unbind(1)
    q, k = (x.float() for x in (q, k))
    q = (q * cos + _rotate_half(q) * sin).to(qkv.dtype)
    return q, (k * cos + _rotate_half(k) * sin).to(qkv.dtype), v


def _flash_attn(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    from flash_attn.layers.rotary import apply_rotary_emb

    heads, v = qkv[:, :2].flatten(1, 2), qkv[:, 2]
    places = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": _SEQUENCE}
    return apply_rotary_emb(heads, *inputs.tables, inplace=True, **places), v


def _liger(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k, v = qkv.unbind(1)
    q, k = (x.transpose(0, 1)[None] for x in (q, k))
    q, k = LigerRopeFunction.apply(q, k, inputs.whole_cos[None], inputs.whole_sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v


def functions(device: str) -> dict[str, Rotate]:
    """This project's function and its peers, by name."""
    found: dict[str, Rotate] = {OURS: _ours, "torch": _torch}
    found["torch.compile"] = torch.compile(_torch, dynamic=False)
    if device == "cuda":
        if importlib.util.find_spec("flash_attn"):
            found["flash-attn"] = _flash_attn
        if importlib.util.find_spec("liger_kernel"):
            found["Liger"] = _liger
    return found


def verify(inputs: Inputs) -> None:
    """Check ours against torch's, forward and backward, before anything is timed."""
    tokens, *_, width = inputs.qkv.shape
    results = []
    for rotate in (_ours, _torch):
        rotated = torch.cat(
            [x.reshape(tokens, -1, width) for x in rotate(inputs.qkv.clone(), inputs)], 1
        )
        results.append((rotated, *inputs.backward(rotate)()))
    for found, expected in zip(*results, strict=True):
        tolerance = 8 * torch.finfo(found.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def cases(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of a dtype."""
    for tokens, width in itertools.product(options.tokens, options.width):
        sizes = (tokens, options.heads, width, dtype, options.device)
        inputs = Inputs(*sizes)
        verify(inputs)
        for direction in ("forward", "backward"):

            def make(direction: str = direction, sizes: Sizes = sizes) -> Runs:
                own = Inputs(*sizes)
                run = own.forward if direction == "forward" else own.backward
                found = functions(torch.device(options.device).type)
                return {name: run(rotate) for name, rotate in found.items()}

            moved = inputs.qkv[:, :2] if direction == "forward" else inputs.qkv
            name = f"[{tokens}, 3, {options.heads}, {width}] {direction}"
            yield Case(name, 2 * moved.numel() * moved.itemsize, inputs.qkv.nbytes, make)


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = memory_bound.parser("rotary", __doc__)
    parser.add_argument("--tokens", nargs="+", type=harness.whole(1), default=[1000, 8192])
    parser.add_argument("--heads", type=harness.whole(1), default=12)
    parser.add_argument("--width", nargs="+", type=harness.whole(2), default=[64])
    options = harness.parse(parser)
    if odd := [width for width in options.width if width % 2]:
        parser.error(f"--width: expected an even number of columns, got {odd[0]}")
    title = "rotary embedding of q and k"
    memory_bound.run("rotary", title, options, lambda dtype: cases(options, dtype))


if __name__ == "__main__":
    exit_with(main)
