"""One batch of attention, by the Triton kernels and by plain torch."""

import torch
from torch import Tensor

from kernels.attention import attention_triton
from kernels.attention.attention import attention_reference
from kernels.attention.attention_options import AttentionOptions

from .attention_lengths import NO_WINDOW, Window, rows_that_meet_none

TAIL = 5  # rows behind the last sequence


def boundaries(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


class AttentionCase:
    """One batch: output, log-sum-exp and gradients by the kernels and by plain torch."""

    def __init__(
        self,
        lengths_q: list[int],
        lengths_k: list[int],
        causal: bool,
        width: int,
        p: float,
        dtype: torch.dtype,
        device: str,
        tail: int = TAIL,
        window: Window = NO_WINDOW,
    ) -> None:
        self.tokens = sum(lengths_q), sum(lengths_k)
        total_q, total_k = (count + tail for count in self.tokens)
        cu_seqlens_q = boundaries(lengths_q, device)
        is_self = lengths_q is lengths_k
        self.cu_seqlens = cu_seqlens_q, cu_seqlens_q if is_self else boundaries(lengths_k, device)
        self.seed = torch.tensor(-99, device=device)
        self.options = AttentionOptions(*(width**-0.5, causal, p, 3, *window), seed=self.seed)
        self.q = torch.randn(total_q, 2, width, device=device).to(dtype)
        # Views of one tensor, and so are their gradients.
        self.kv = torch.randn(total_k, 2, 2, width, device=device).to(dtype)
        self.grad_out = torch.randn_like(self.q)
        pairs = list(zip(lengths_q, lengths_k, strict=True))
        blind, _ = rows_that_meet_none(pairs, causal, total_q, total_k, window)
        # Neither queries that see no key nor rows that are in no sequence count.
        for x, rows in (
            (self.q, blind),
            (self.grad_out, blind),
            (self.kv, slice(sum(lengths_k), None)),
        ):
            x[rows] = torch.nan

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        inputs = (self.q, *self.kv.unbind(1))
        leaves = [x.nan_to_num().to(dtype).requires_grad_() for x in inputs]
        out, lse = attention_reference(*leaves, *self.cu_seqlens, self.options)
        grads = torch.autograd.grad(out, leaves, self.grad_out.nan_to_num().to(dtype))
        return [out, lse.masked_fill(lse.isneginf(), 0), *grads]

    def run(self, **known: object) -> list[Tensor]:
        inputs = (self.q, *self.kv.unbind(1))
        options = (*self.cu_seqlens, self.options)
        out, lse = attention_triton.forward(*inputs, *options, **known)
        grad_q, grad_kv = (torch.full_like(x, torch.nan) for x in (self.q, self.kv))
        grads = (grad_q, *grad_kv.unbind(1))
        saved = (self.grad_out, *inputs, out, lse)
        attention_triton.backward(*saved, *options, grads=grads, **known)
        for x, tokens in zip((out, grad_q, grad_kv), (*self.tokens[:1], *self.tokens), strict=True):
            assert x[tokens:].count_nonzero() == 0
        assert lse[:, self.tokens[0] :].isneginf().all()
        self.results = [out, lse, *grads]
        return [out, lse.masked_fill(lse.isneginf(), 0), *grads]
