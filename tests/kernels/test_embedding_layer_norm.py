"""BERT's embedding layer in one operator, against float64 and against one layer after the other."""

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import (
    Columns,
    EmbeddingRows,
    TaskRows,
    TaskSegments,
    embedding_layer_norm,
    plan_lookups,
    zero_rows_,
)
from kernels.dropout.dropout import dropout_factors

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(99)
TOKENS = 300  # several of the blocks of 64 rows that one thread takes, and a part of one
TABLE_ROWS = (50, 40, 2)
# Tasks of unlike size, an empty one among them, and rows behind that belong to nobody.
OFFSETS = (0, 150, 150, 151, 290)


def ids(tokens: int = TOKENS) -> list[Tensor]:
    return [torch.randint(0, rows, (tokens,)) for rows in TABLE_ROWS]


def leaves(width: int, dtype: torch.dtype) -> list[Tensor]:
    """Three tables, weight and bias."""
    tables = [torch.randn(rows, width).to(dtype) for rows in TABLE_ROWS]
    return [*tables, 1 + 0.5 * torch.randn(width), torch.randn(width)]


def results(
    function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor
) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("width", [13, 384, 768])
def test_output_and_gradients(width: int, p: float, dtype: torch.dtype) -> None:
    factors = dropout_factors(TOKENS * width, p, SEED, 4).view(TOKENS, width)
    found, expected, exact = [], [], []
    # The largest errors of several batches: those of a few numbers are a matter of luck.
    for _ in range(30 if width < 100 else 1):
        index, tensors, grad_out = ids(), leaves(width, dtype), torch.randn(TOKENS, width)

        def kernel(*tensors: Tensor, index: list[Tensor] = index) -> Tensor:
            return embedding_layer_norm(*index, *tensors, dropout_p=p, seed=SEED, rng_offset=4)

        def torchs(*tensors: Tensor, index: list[Tensor] = index) -> Tensor:
            *tables, weight, bias = tensors
            dtype = tables[0].dtype
            total = sum(F.embedding(i, table) for i, table in zip(index, tables, strict=True))
            out = F.layer_norm(total, (width,), weight.to(dtype), bias.to(dtype), 1e-12)
            return out * factors.to(dtype)

        grad_out = grad_out.to(dtype)
        found.append(results(kernel, tensors, grad_out))
        expected.append(results(torchs, tensors, grad_out))
        exact.append(results(torchs, [tensor.double() for tensor in tensors], grad_out))
    for batches in zip(
        *(zip(*runs, strict=True) for runs in (found, expected, exact)), strict=True
    ):
        assert_within_twice(*map(torch.stack, batches))


def embedding_rows(tasks: int, width: int, dtype: torch.dtype) -> EmbeddingRows:
    """Views of one buffer: zeros for the tables, NaN for the norm."""
    shapes = [*((rows, width) for rows in TABLE_ROWS), (width,), (width,)]
    starts = accumulate((torch.Size(shape).numel() for shape in shapes), initial=0)
    columns = list(map(Columns, starts, shapes))
    buffer = torch.zeros(tasks, columns[-1].stop + 3, dtype=dtype)
    buffer[:, columns[3].start : columns[4].stop] = torch.nan
    tables = (TaskRows(buffer, of_table) for of_table in columns[:3])
    return EmbeddingRows(*tables, TaskRows(buffer, *columns[3:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_task_rows_without_a_bias(dtype: torch.dtype) -> None:
    index = ids()
    *tensors, zeros = (tensor.to(dtype).requires_grad_() for tensor in leaves(40, dtype))
    found = []
    for bias in (None, zeros.detach().zero_()):
        rows = embedding_rows(2, 40, dtype)
        rows = rows._replace(norm=rows.norm._replace(bias_columns=None))
        options = {"rows": rows, "segments": TaskSegments((0, 140, 300))}
        embedding_layer_norm(*index, *tensors, bias, **options).square().sum().backward()
        found.append([part.weight for part in rows])
    assert all(map(torch.equal, *found))
    assert all(part.count_nonzero() > 0 for part in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_rows_without_columns_for_a_frozen_table(frozen: int, dtype: torch.dtype) -> None:
    index = ids()
    tensors = [tensor.to(dtype).requires_grad_() for tensor in leaves(40, dtype)]
    whole, part = (embedding_rows(2, 40, dtype) for _ in range(2))
    name = EmbeddingRows._fields[frozen]
    frozen_rows = part._replace(**{name: part[frozen]._replace(weight_columns=None)})
    for rows in (whole, frozen_rows):
        options = {"rows": rows, "segments": TaskSegments((0, 140, 300))}
        embedding_layer_norm(*index, *tensors, **options).square().sum().backward()
        tensors[frozen].requires_grad_(False)
    for own, expected, is_frozen in zip(part, whole, (i == frozen for i in range(4)), strict=True):
        if is_frozen:
            assert own.weight.count_nonzero() == 0
        else:
            assert torch.equal(own.weight, expected.weight)
    assert torch.equal(part.norm.bias, whole.norm.bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_task_rows_hold_each_tasks_own_gradient(dtype: torch.dtype, p: float) -> None:
    width, index = 40, ids()
    tensors = [tensor.to(dtype).requires_grad_() for tensor in leaves(width, dtype)]
    grad_out = torch.randn(TOKENS, width).to(dtype)
    rows = embedding_rows(4, width, dtype)

    def function(rows: EmbeddingRows | None, segments: TaskSegments | None) -> Tensor:
        options = {"dropout_p": p, "seed": SEED, "rows": rows, "segments": segments}
        return embedding_layer_norm(*index, *tensors, **options)

    function(rows, TaskSegments(OFFSETS)).backward(grad_out)
    assert all(tensor.grad is None for tensor in tensors)
    found = [*(part.weight for part in rows), rows.norm.bias]
    for task, (begin, end) in enumerate(pairwise(OFFSETS)):
        own = torch.zeros_like(grad_out)
        own[begin:end] = grad_out[begin:end]
        expected = torch.autograd.grad(function(None, None), tensors, own)
        # The same sums in another order, of up to 150 terms.
        tolerance = 150 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        tolerance = max(tolerance, torch.finfo(dtype).eps)
        for result, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(result[task], gradient, rtol=tolerance, atol=tolerance)
    for table, own_index in zip(rows[:3], index, strict=True):
        zero_rows_(table.weight, own_index, OFFSETS)
        assert table.weight.count_nonzero() == 0


PADDING = (3, None, -1)
"""Of words, positions and token types; the last is counted from the end."""
PADDING_ROWS = (3, None, 1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_lookups_of_padding_give_no_gradient(dtype: torch.dtype) -> None:
    index, tensors, grad_out = ids(), leaves(40, dtype), torch.randn(TOKENS, 40)

    def kernel(padding: tuple) -> Callable[..., Tensor]:
        return lambda *tensors: embedding_layer_norm(*index, *tensors, padding_idx=padding)

    def torchs(*tensors: Tensor) -> Tensor:
        *tables, weight, bias = tensors
        rows = zip(index, tables, PADDING, strict=True)
        total = sum(F.embedding(i, table, row) for i, table, row in rows)
        return F.layer_norm(total, (40,), weight, bias, 1e-12)

    found = results(kernel(PADDING), tensors, grad_out)
    without = results(kernel((None, None, None)), tensors, grad_out)
    exact = results(torchs, [tensor.double() for tensor in tensors], grad_out)
    for number, (own, other, expected) in enumerate(zip(found, without, exact, strict=True)):
        row = PADDING_ROWS[number - 1] if 1 <= number <= 3 else None
        if row is not None:
            assert other[row].count_nonzero() > 0
            assert own[row].count_nonzero() == expected[row].count_nonzero() == 0
            other[row] = 0
        assert torch.equal(own, other)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_task_rows_keep_what_others_write_at_padding(dtype: torch.dtype, planned: bool) -> None:
    """As the decoder of a language model does that shares the word table."""
    index, tensors = ids(), [tensor.to(dtype).requires_grad_() for tensor in leaves(40, dtype)]
    found = []
    for padding in ((None, None, None), PADDING):
        rows = embedding_rows(4, 40, dtype)
        for own in rows[:3]:
            own.weight[:, -1], own.weight[:, 3:4] = 5, 7
        columns = [own.weight_columns for own in rows[:3]]
        options = {
            "segments": TaskSegments(OFFSETS),
            "plan": plan_lookups(index, columns, OFFSETS) if planned else None,
        }
        out = embedding_layer_norm(*index, *tensors, rows=rows, padding_idx=padding, **options)
        out.square().sum().backward()
        found.append([*(own.weight for own in rows), rows.norm.bias])
    for number, (other, own) in enumerate(zip(*found, strict=True)):
        row = PADDING_ROWS[number] if number < 3 else None
        if row is not None:
            before = 5 if row == own.shape[1] - 1 else 7
            assert not (other[:, row] == before).all()
            assert (own[:, row] == before).all()
            other[:, row] = before
        assert torch.equal(own, other)


def test_a_row_of_bfloat16_is_rounded_once() -> None:
    """Two token types: sums of thousands, to which bfloat16 itself could add no more."""
    tokens, width = 4000, 16
    index = [torch.randint(0, 40, (tokens,)), torch.zeros(tokens).long(), torch.ones(tokens).long()]
    tensors = leaves(width, torch.bfloat16)

    def token_type_gradient(dtype: torch.dtype) -> Tensor:
        own = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = embedding_layer_norm(*index, *own)
        return torch.autograd.grad(out, own[2], torch.ones_like(out) + out.detach())[0][1]

    exact = token_type_gradient(torch.float64)
    error = (token_type_gradient(torch.bfloat16).double() - exact).abs().max()
    assert error <= 0.02 * exact.abs().max()


def test_accumulate_adds_to_the_rows() -> None:
    index, tensors = ids(), [tensor.requires_grad_() for tensor in leaves(8, torch.float32)]
    once, twice = embedding_rows(4, 8, torch.float32), embedding_rows(4, 8, torch.float32)
    for rows, add in ((once, False), (twice, False), (twice, True)):
        segments = TaskSegments(OFFSETS, accumulate=add)
        embedding_layer_norm(*index, *tensors, rows=rows, segments=segments).sum().backward()
    for one, other in zip(once, twice, strict=True):
        # Sums of a few parts, in another order.
        torch.testing.assert_close(2 * one.weight, other.weight, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(2 * once.norm.bias, twice.norm.bias, rtol=1e-6, atol=1e-5)


def test_batches_of_any_shape_and_none() -> None:
    tensors = leaves(8, torch.float32)
    index = [i.view(2, 150).t() for i in ids()]
    flat = [i.reshape(-1) for i in index]
    expected = embedding_layer_norm(*flat, *tensors).view(150, 2, 8)
    assert torch.equal(embedding_layer_norm(*index, *tensors), expected)
    nothing = [i[:0] for i in flat]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = embedding_layer_norm(*nothing, *tensors)
    assert out.shape == (0, 8)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.count_nonzero() == 0 for grad in grads)


def test_repeats_to_the_bit_whatever_the_threads() -> None:
    index, tensors = ids(), leaves(384, torch.float32)
    grad_out = torch.randn(TOKENS, 384)

    def function(*tensors: Tensor) -> Tensor:
        return embedding_layer_norm(*index, *tensors, dropout_p=0.1, seed=SEED)

    first = results(function, tensors, grad_out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = results(function, tensors, grad_out)
    torch.set_num_threads(threads)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


INDEX, LEAVES = ids(6), leaves(8, torch.float32)
OTHER_NORM = embedding_rows(1, 8, torch.float32).norm


def replaced(position: int, value: Tensor) -> list[Tensor]:
    arguments = [*INDEX, *LEAVES]
    arguments[position] = value
    return arguments


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (replaced(0, INDEX[0].int()), {}, "word_ids: expected int64"),
        (replaced(1, INDEX[1][:5]), {}, "position_ids: expected int64"),
        (replaced(2, INDEX[2].to("meta")), {}, "token_type_ids: expected on cpu"),
        (replaced(2, INDEX[2] + 2), {}, "token_type_ids: expected 0 <= index < 2"),
        (replaced(0, INDEX[0] - 60), {}, "word_ids: expected 0 <= index"),
        (replaced(4, LEAVES[1][:, :7]), {}, "position: expected"),
        (replaced(5, LEAVES[2].half()), {}, "token_type: expected a floating dtype as word"),
        (replaced(6, torch.ones(7)), {}, "weight: expected"),
        (replaced(7, torch.ones(7)), {}, "bias: expected"),
        ([*INDEX, *LEAVES], {"dropout_p": 1.0}, "probability"),
        (
            [*INDEX, *LEAVES],
            {"padding_idx": (50, None, None)},
            "padding_idx: .* of word, -50 to 49",
        ),
        ([*INDEX, *LEAVES], {"padding_idx": (0, 0, -3)}, "padding_idx: .* of token_type"),
        ([*INDEX, *LEAVES], {"padding_idx": (0, 0)}, "padding_idx: expected a row of each table"),
        ([*INDEX, *LEAVES], {"padding_idx": (0.5, None, None)}, "padding_idx: expected"),
        ([*INDEX, *LEAVES], {"rows": embedding_rows(1, 8, torch.float32)}, "segments: needed"),
        (
            [*INDEX, *LEAVES],
            {"rows": EmbeddingRows(*embedding_rows(1, 8, torch.float32)[:3], OTHER_NORM)},
            "in one buffer",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: list[Tensor], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_layer_norm(*arguments, **options)
