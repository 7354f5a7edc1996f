"""Check operators whose CUDA side is Python; C++ checks for itself (csrc/check_torch.h).

Anybody can call an operator of ``torch.ops`` with anything, and what autograd saved for a backward
pass may come back changed.  A kernel that is launched on it would read beyond its tensors.  All
raise ValueError, and name the argument.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.attention_checks import check_boundaries, check_qkv
from ..attention.attention_options import AttentionOptions
from ..dropout.dropout import check_dropout
from ..layer_norm.layer_norm_parameters import check_parameter
from .validation import (
    DTYPES,
    are_checked,
    check_data,
    check_index,
    check_number,
    check_offsets,
    check_tensor,
)

KERNEL_DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.float64)


def check_kernel_dtype(name: str, x: Tensor) -> None:
    """Check a dtype that the kernels, and not the float64 references, compute in."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def check_seed(p: float, seed: Tensor | None, rng_offset: int, device: torch.device) -> None:
    """Check the arguments of dropout."""
    check_dropout(p, seed, rng_offset, device)
    check_seed_given(p, seed)


def check_seed_given(p: float, seed: Tensor | None) -> None:
    """Check that dropout has a seed, and that it has data."""
    if p > 0 and seed is None:
        raise ValueError("seed: dropout needs a tensor of one int64")
    check_data(seed=seed)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> None:
    """Check what both passes of attention are given."""
    check_kernel_dtype("q", q)
    check_qkv(q, k, v)
    check_data(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_boundaries("cu_seqlens_q", cu_seqlens_q, q)
    check_boundaries("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError("cu_seqlens_k: expected as many sequences as cu_seqlens_q")
    options.check(q.device)
    check_seed_given(options.dropout_p, options.seed)


def check_attention_backward(grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    """Check what the backward pass is given besides."""
    for name, x in (("grad_out", grad_out), ("out", out)):
        check_tensor(name, x, q.shape, q.dtype, q.device)
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out: expected a contiguous last dimension, got strides {out.stride()}")
    check_tensor("lse", lse, (q.shape[1], q.shape[0]), torch.float32, q.device)


def check_packed(qkv: Tensor) -> None:
    """Check the shape of one tensor of queries, keys and values."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [tokens, 3, heads, width], got {list(qkv.shape)}")
    check_data(qkv=qkv)


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> None:
    """Check what the forward passes that end in a layer norm are given."""
    _check_hidden("x", x)
    check_number("eps", eps)
    for name, parameter in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        check_parameter(name, parameter, x)
        check_data(**{name: parameter})
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
    check_seed(dropout_p, seed, rng_offset, x.device)


def _check_hidden(name: str, x: Tensor) -> None:
    check_kernel_dtype(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., width], got {list(x.shape)}")
    check_data(**{name: x})


def check_norm_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> None:
    """Check what the backward passes are given; ``hidden`` may be any rows of that shape."""
    _check_hidden("hidden", hidden)
    check_tensor("grad_out", grad_out, hidden.shape, hidden.dtype, hidden.device)
    check_parameter("weight", weight, hidden)
    check_data(weight=weight)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_tensor(name, statistic, hidden.shape[:-1], torch.float32, hidden.device)
        if not statistic.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")
    check_offsets("offsets", offsets, mean.numel())
    for name, rows in (("weight_rows", weight_rows), ("bias_rows", bias_rows)):
        if rows.numel() > 0:
            _check_rows(name, rows, hidden, len(offsets) - 1)
    check_seed(dropout_p, seed, rng_offset, hidden.device)


def _check_rows(name: str, rows: Tensor, hidden: Tensor, tasks: int) -> None:
    width = hidden.shape[-1]
    check_kernel_dtype(name, rows)
    check_tensor(name, rows, (tasks, width), rows.dtype, hidden.device)
    if (width > 1 and rows.stride(1) != 1) or (tasks > 1 and rows.stride(0) < width):
        raise ValueError(f"{name}: expected rows that lie apart, with contiguous columns")


def check_embedded(ids: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """Check three indices ``[T]`` against the tables ``[N, H]`` that they look up."""
    names = ("word", "position", "token_type")
    word = tables[0]
    check_kernel_dtype("word", word)
    for name, table, index in zip(names, tables, ids, strict=True):
        if table.dim() != 2 or table.shape[1] == 0:
            raise ValueError(f"{name}: expected [rows, width], got {list(table.shape)}")
        check_tensor(name, table, (len(table), word.shape[1]), word.dtype, word.device)
        _check_ids(f"{name}_ids", index, ids[0].numel(), table)


def _check_ids(name: str, index: Tensor, tokens: int, table: Tensor) -> None:
    check_tensor(name, index, (tokens,), torch.int64, table.device)
    if not index.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")
    if are_checked(table):
        check_index(name, index, len(table))


def check_embedding_gradients(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Check rows ``[K, N, H]`` that the gradients of looked up rows are added to."""
    check_kernel_dtype("rows", rows)
    sizes, strides = rows.shape, rows.stride()
    if rows.dim() != 3 or (
        (sizes[2] > 1 and strides[2] != 1)
        or (sizes[1] > 1 and strides[1] != sizes[2])
        or (sizes[0] > 1 and strides[0] < sizes[1] * sizes[2])
    ):
        raise ValueError("rows: expected [tasks, N, H] with contiguous tables that lie apart")
    check_data(rows=rows)
    _check_ids("index", index, index.numel(), rows[0] if len(rows) else rows.new_empty(0))
    check_tensor("grad_output", grad_output, (len(index), sizes[2]), rows.dtype, rows.device)
    if len(offsets) not in (0, len(rows) + 1):
        raise ValueError("offsets: expected tasks + 1 row numbers")
    check_offsets("offsets", offsets, len(index))
