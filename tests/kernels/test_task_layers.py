"""Linear and embedding layers that write task gradients, against autograd task by task.

Shapes: one row, a prime, just off a power of two, BERT's 384; an empty task at either end and in
the middle; padding rows after the last task.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Columns, TaskRows

from .tolerance import assert_within_twice

OFFSETS = [(0, 1), (0, 7, 7, 20), (0, 0, 13, 31), (0, 5, 129, 129), (0, 40, 97)]
DTYPES = [torch.float32, torch.bfloat16]


def task_gradients(x: Tensor, dy: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    pairs = [(x[a:b], dy[a:b]) for a, b in pairwise(offsets)]
    return torch.stack([d.T @ i for i, d in pairs]), torch.stack([d.sum(0) for _, d in pairs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("width", [1, 13, 384])
def test_linear(offsets, width, dtype):
    total, out = offsets[-1] + 2, 17
    x = torch.randn(total, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(out, dtype=dtype, requires_grad=True)
    dy = torch.randn(total, out, dtype=dtype)
    tasks = len(offsets) - 1
    rows = kernels.new_task_rows(tasks, weight, bias, fill=torch.nan)
    y = kernels.linear(x, weight, bias, rows=rows, segments=kernels.TaskSegments(offsets))
    y.backward(dy)

    exact = task_gradients(x.detach().double(), dy.double(), offsets)
    torchs = task_gradients(x.detach(), dy, offsets)
    assert_within_twice(rows.weight, torchs[0], exact[0])
    assert_within_twice(rows.bias, torchs[1], exact[1])
    inputs = [tensor.detach() for tensor in (x, weight, bias)]
    linear = torch.nn.functional.linear
    assert_within_twice(y, linear(*inputs), linear(*(tensor.double() for tensor in inputs)))
    assert_within_twice(x.grad, dy @ inputs[1], dy.double() @ inputs[1].double())
    assert weight.grad is None
    assert bias.grad is None


def test_linear_accumulates():
    x, dy, offsets = torch.randn(9, 4), torch.randn(9, 5), (0, 4, 9)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.zeros(5, requires_grad=True)
    rows = kernels.new_task_rows(2, weight, bias, fill=1)
    segments = kernels.TaskSegments(offsets, accumulate=True)
    kernels.linear(x, weight, bias, rows=rows, segments=segments).backward(dy)
    expected = task_gradients(x, dy, offsets)
    torch.testing.assert_close(rows.weight, 1 + expected[0])
    torch.testing.assert_close(rows.bias, 1 + expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_embedding(offsets, dtype):
    total, tasks = offsets[-1], len(offsets) - 1
    index = torch.randint(0, 11, (total,))  # every entry several times
    weight = torch.randn(11, 7, dtype=dtype, requires_grad=True)
    dy = torch.randn(total, 7, dtype=dtype)
    task_rows = kernels.new_task_rows(tasks, weight)
    rows, segments = task_rows.weight, kernels.TaskSegments(offsets)
    y = kernels.embedding(index, weight, rows=task_rows, segments=segments)
    y.backward(dy)

    one_hot = torch.nn.functional.one_hot(index, 11)
    exact, _ = task_gradients(dy.double(), one_hot.double(), offsets)
    torchs = torch.stack(
        [
            torch.zeros(11, 7, dtype=dtype).index_add_(0, index[a:b], dy[a:b])
            for a, b in pairwise(offsets)
        ]
    )
    assert_within_twice(rows, torchs, exact)
    assert torch.equal(y, weight[index])
    assert weight.grad is None
    kernels.zero_rows_(rows, index, offsets)
    assert not rows.any()


WEIGHT, BIAS = torch.zeros(5, 4, requires_grad=True), torch.zeros(5, requires_grad=True)
ROWS = kernels.new_task_rows(2, WEIGHT, BIAS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"segments": None}, "segments: needed with rows"),
        ({"rows": kernels.new_task_rows(3, WEIGHT, BIAS)}, "rows.buffer: expected"),
        ({"rows": kernels.new_task_rows(2, WEIGHT.t(), BIAS)}, "rows.weight_columns: .*shape"),
        ({"rows": kernels.new_task_rows(2, WEIGHT)}, "rows.bias_columns: None"),
        ({"rows": TaskRows(torch.zeros(2, 24), Columns(0, (5, 4)), Columns(20, (5,)))}, "20 to 25"),
        ({"rows": TaskRows(torch.zeros(25, 2).t(), *ROWS[1:])}, "with contiguous rows"),
        ({"segments": kernels.TaskSegments((0, 4, 10))}, "segments.offsets"),
    ],
)
def test_what_does_not_fit_is_named(change, expected):
    arguments = {
        "rows": ROWS,
        "segments": kernels.TaskSegments((0, 4, 9)),
    }
    with pytest.raises(ValueError, match=expected):
        kernels.linear(torch.randn(9, 4), WEIGHT, BIAS, **(arguments | change))
