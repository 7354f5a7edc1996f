"""The Triton kernels of embeddings with a layer norm."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dropout.dropout import dropout_factors
from kernels.embedding_layer_norm import embedding_layer_norm_triton

from ..tolerance import assert_within_twice


@pytest.mark.parametrize(("width", "p"), [(13, 0.0), (384, 0.3)])
def test_embedding_layer_norm(width: int, p: float, device: str) -> None:
    num_rows, offsets = 150, (0, 70, 70, 71, 140)
    ids = [torch.randint(0, count, (num_rows,), device=device) for count in (50, 40, 2)]
    leaves = [torch.randn(count, width, device=device) for count in (50, 40, 2)]
    leaves += [1 + 0.2 * torch.randn(width, device=device), torch.randn(width, device=device)]
    grad_out = torch.randn(num_rows, width, device=device)
    seed = torch.tensor(7, device=device)
    factors = dropout_factors(grad_out.numel(), p, seed, 4).view_as(grad_out)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        *tables, weight, bias = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        h = sum(table[index] for index, table in zip(ids, tables, strict=True))
        out = F.layer_norm(h, (width,), weight, bias, 1e-12) * factors.to(dtype)
        (grad_sum,) = torch.autograd.grad(out, h, grad_out.to(dtype), retain_graph=True)
        tasks = []
        for begin, end in pairwise(offsets):
            own = torch.zeros_like(out)
            own[begin:end] = grad_out[begin:end]
            tasks.append(
                torch.cat(torch.autograd.grad(out, (weight, bias), own, retain_graph=True))
            )
        return [out.detach(), grad_sum, torch.stack(tasks)]

    arguments = (*leaves[3:], p, 1e-12, seed, 4)
    out, mean, rstd = embedding_layer_norm_triton.forward(ids, leaves[:3], *arguments)
    rows = torch.full((4, 2 * width), torch.nan, device=device)
    grad_sum = embedding_layer_norm_triton.backward(
        *(grad_out, ids, leaves[:3], leaves[3], mean, rstd),
        *(rows[:, :width], rows[:, width:], offsets, False, p, seed, 4),
    )
    exact, torchs = reference(torch.float64), reference(torch.float32)
    for tensors in zip([out, grad_sum, rows], torchs, exact, strict=True):
        assert_within_twice(*tensors)
