"""The Triton kernels themselves against float64.

Run twice: under Triton's interpreter on the CPU by test_triton_interpreter.py, and compiled on a
GPU by test_triton.py.  In float32, and attention, whose code differs, in float16 too; not in
bfloat16, to which the interpreter does not round as a GPU does.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.attention import attention_plan_triton, attention_runs_triton, attention_triton
from kernels.attention.attention import attention_reference
from kernels.attention.attention_options import AttentionOptions
from kernels.attention.attention_plan import (
    AttentionPlan,
    attention_plan,
    attention_plan_reference,
    max_runs,
)
from kernels.dropout import dropout_triton
from kernels.dropout.dropout import dropout_factors
from kernels.embedding import embedding_triton, lookup_plan_triton
from kernels.embedding.lookup_plan import ALL_TABLES
from kernels.embedding_layer_norm import embedding_layer_norm_triton
from kernels.layer_norm import layer_norm_triton
from kernels.linear import linear, linear_triton
from kernels.take_rows import take_rows_triton
from kernels.take_rows.take_rows import take_rows_reference

from .attention_lengths import (
    EMPTY,
    FEW_KEYS,
    RUNS,
    assert_structure,
    drawn_pairs,
    reference_by_sequence,
    rows_that_meet_none,
)
from .conftest import untouched_memory
from .interpreter import builtins_replaced_once
from .test_lookup_plan import Lookups
from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TAIL = 5  # rows behind the last sequence
# Several sequences in a tile, sequences of several tiles, and nothing at all; one list for both is
# self-attention, which goes by runs.
LENGTHS = {
    "sentences": ([18, 1, 0, 23, 17, 60, 3],) * 2,
    "tiles": ([64, 90, 1],) * 2,
    "cross": ([3, 5, 0, 70, 4], [7, 2, 4, 130, 0]),
    "nothing": ([0, 0],) * 2,
    "no sequence": ([],) * 2,
}


@pytest.fixture
def device() -> Iterator[str]:
    """The CPU, under the interpreter; test_triton.py has a GPU."""
    with builtins_replaced_once():
        yield "cpu"


def boundaries(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("causal", "width", "p", "dtype"),
    [
        (False, 32, 0.0, torch.float32),
        (True, 20, 0.2, torch.float32),
        (True, 64, 0.2, torch.float32),
        (False, 96, 0.2, torch.float32),
        (True, 32, 0.2, torch.float16),
        (False, 64, 0.0, torch.float16),
        (True, 128, 0.2, torch.float16),
    ],
)
def test_attention(causal: bool, width: int, p: float, dtype: torch.dtype, device: str) -> None:
    found: list[list[Tensor]] = []
    torchs: list[list[Tensor]] = []
    exact: list[list[Tensor]] = []
    # The largest errors of several draws of all cases: those of a few tokens are a matter of luck.
    # Two are enough of the width whose tiles are small, so that the interpreter takes long.
    for lengths_q, lengths_k in (2 if width == 96 else 3) * list(LENGTHS.values()):
        case = AttentionCase(lengths_q, lengths_k, causal, width, p, dtype, device)
        found.append(case.run())
        torchs.append(case.reference(dtype))
        exact.append(case.reference(torch.float64))
    for results in zip(
        *(zip(*cases, strict=True) for cases in (found, torchs, exact)), strict=True
    ):
        assert_within_twice(*(torch.cat([x.flatten() for x in parts]) for parts in results))


@pytest.mark.parametrize(
    ("causal", "p", "dtype"),
    [
        (True, 0.0, torch.float32),
        (True, 0.2, torch.float16),
        (False, 0.2, torch.float32),
        (False, 0.0, torch.float16),
    ],
)
def test_attention_over_lengths_on_both_sides_of_every_block(
    causal: bool, p: float, dtype: torch.dtype, device: str
) -> None:
    seed = 2 * causal + (p > 0)  # draws other pairs for each case
    pairs = [*FEW_KEYS[3:6], *EMPTY, *drawn_pairs(4, seed)]
    case = AttentionCase(*map(list, zip(*pairs, strict=True)), causal, 32, p, dtype, device)
    found = case.run()
    streams = tuple(x.cpu() for x in (case.q, *case.kv.unbind(1), case.grad_out))
    torchs, exact = (
        reference_by_sequence(pairs, streams, own, causal, p, case.seed.cpu(), 3)
        for own in (dtype, torch.float64)
    )
    assert_structure(pairs, causal, [x.cpu() for x in case.results])
    for tensors in zip([x.cpu() for x in found], torchs, exact, strict=True):
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


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
    ) -> None:
        self.tokens = sum(lengths_q), sum(lengths_k)
        total_q, total_k = (count + tail for count in self.tokens)
        cu_seqlens_q = boundaries(lengths_q, device)
        is_self = lengths_q is lengths_k
        self.cu_seqlens = cu_seqlens_q, cu_seqlens_q if is_self else boundaries(lengths_k, device)
        self.seed = torch.tensor(-99, device=device)
        self.options = AttentionOptions(
            width**-0.5, causal, dropout_p=p, rng_offset=3, seed=self.seed
        )
        self.q = torch.randn(total_q, 2, width, device=device).to(dtype)
        # Views of one tensor, and so are their gradients.
        self.kv = torch.randn(total_k, 2, 2, width, device=device).to(dtype)
        self.grad_out = torch.randn_like(self.q)
        pairs = list(zip(lengths_q, lengths_k, strict=True))
        blind, _ = rows_that_meet_none(pairs, causal, total_q, total_k)
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


@pytest.mark.parametrize(
    ("causal", "width", "p", "dtype"),
    [
        (False, 32, 0.2, torch.float32),
        (True, 20, 0.0, torch.float32),
        (True, 64, 0.2, torch.float16),
        (False, 96, 0.0, torch.float16),
    ],
)
def test_attention_in_runs(
    causal: bool, width: int, p: float, dtype: torch.dtype, device: str
) -> None:
    found: list[list[Tensor]] = []
    torchs: list[list[Tensor]] = []
    exact: list[list[Tensor]] = []
    for lengths, tail in [*((lengths, TAIL) for lengths in RUNS.values()), ([3], 70)]:
        case = AttentionCase(lengths, lengths, causal, width, p, dtype, device, tail)
        found.append(case.run())
        torchs.append(case.reference(dtype))
        exact.append(case.reference(torch.float64))
    for results in zip(
        *(zip(*cases, strict=True) for cases in (found, torchs, exact)), strict=True
    ):
        assert_within_twice(*(torch.cat([x.flatten() for x in parts]) for parts in results))


@pytest.mark.parametrize("lengths", [RUNS["long and short"], [18, 1, 0, 23, 17, 60, 3]])
def test_attention_is_the_same_by_runs_and_by_tiles(
    lengths: list[int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same dropped weights: others would show."""
    case = AttentionCase(lengths, lengths, True, 32, 0.5, torch.float32, device)
    total, longest = len(case.q), max(lengths)
    plan = attention_plan(case.cu_seqlens[0], total)
    by_runs = case.run(plan=plan, max_seqlen=longest)
    for one, other in zip(by_runs, case.run(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(attention_runs_triton, "WARPS", {})
    by_tiles = [case.run()]
    case.cu_seqlens = case.cu_seqlens[0], case.cu_seqlens[1].clone()
    by_tiles.append(case.run())  # as of queries with boundaries of their own
    for results in by_tiles:
        for one, other in zip(by_runs, results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sequences_that_are_surely_short_are_not_looked_for(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase([61, 5], [61, 5], False, 32, 0.0, torch.float32, device)
    case.cu_seqlens = (case.cu_seqlens[0],) * 2
    expected = case.run()
    for kernel in ("forward_kernel", "grad_q_kernel", "grad_kv_kernel"):
        monkeypatch.delattr(attention_triton, kernel)
    for one, other in zip(case.run(max_seqlen=61), expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(NameError):
        case.run(max_seqlen=62)


@pytest.mark.parametrize("tail", [0, 1, 64, 200])
@pytest.mark.parametrize("name", RUNS)
def test_plans_are_the_same_on_host_and_device(name: str, tail: int, device: str) -> None:
    total = sum(RUNS[name]) + tail
    plans = [
        attention_plan_triton.make_plan(boundaries(RUNS[name], device), total),
        attention_plan(boundaries(RUNS[name], "cpu"), total),
    ]
    expected = attention_plan_reference(boundaries(RUNS[name], "cpu"), total)
    for plan in plans:
        for found, tensor in zip(plan, expected, strict=True):
            assert torch.equal(found.cpu(), tensor)


@pytest.mark.parametrize("value", [-(2**31), -7, 5, 2**31 - 1])
def test_attention_stays_inside_its_tensors_with_a_wrong_plan(value: int, device: str) -> None:
    memory = torch.full((70, 3, 1, 32), torch.nan, device=device)
    qkv = memory[20:60]
    qkv.normal_()
    cu_seqlens = boundaries([40], device)
    runs = torch.tensor([[value, 40], [0, value], [3, 1]], dtype=torch.int32, device=device)
    bounds = torch.full((2, 40), value, dtype=torch.int32, device=device)
    for first, last in (
        (bounds[0], bounds[1]),
        (bounds[0], 0 * bounds[1]),
        (0 * bounds[0], bounds[1]),
    ):
        plan = AttentionPlan(runs[: max_runs(40)], torch.stack((first, last)))
        options = (cu_seqlens, cu_seqlens, AttentionOptions(0.2, causal=value == 5))
        out, lse = attention_triton.forward(*qkv.unbind(1), *options, plan=plan)
        grads = torch.full_like(memory, torch.nan)
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(
            torch.ones_like(out), *inputs, *options, grads=grads[20:60].unbind(1), plan=plan
        )
        assert grads[:20].isnan().all()
        assert grads[60:].isnan().all()


def test_attention_with_more_sequences_than_a_grid_has_rows(device: str) -> None:
    lengths = [0] * 70_000
    lengths[123], lengths[-1] = 5, 9
    qkv = torch.randn(14, 3, 1, 32, device=device)
    few, many = (
        attention_triton.forward(*qkv.unbind(1), cu, cu, AttentionOptions(0.2))
        for cu in (boundaries([5, 9], device), boundaries(lengths, device))
    )
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [[0, 3, 12], [-4, 3, 8]])
def test_attention_stays_inside_its_tensors(wrong: list[int], device: str) -> None:
    """Wrong boundaries, which a GPU does not look at unless asked to, reach no other memory."""
    qkv = torch.full((20, 3, 1, 32), torch.nan, device=device)[6:14]
    qkv.normal_()
    results = []
    for numbers in ([0, 3, 8], wrong):
        cu = torch.tensor(numbers, dtype=torch.int32, device=device)
        options = (cu, cu, AttentionOptions(0.2))
        out, lse = attention_triton.forward(*qkv.unbind(1), *options)
        grad = torch.empty_like(qkv)
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(torch.ones_like(out), *inputs, *options, grads=grad.unbind(1))
        results.append((out, lse, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_attention_with_offsets_beyond_32_bits(device: str) -> None:
    """Rows 2^28 elements apart; the memory between them is never touched."""
    row, cu_seqlens = 2**28, boundaries([5, 6], device)
    near = torch.randn(11, 3, 1, 32, device=device).half()
    with untouched_memory():
        far = torch.empty(11 * row, dtype=torch.float16, device=device)
    far = far.as_strided((11, 3, 1, 32), (row, 32, 32, 1)).copy_(near)
    options = (cu_seqlens, cu_seqlens, AttentionOptions(0.2))
    results = []
    for qkv in (near, far):
        out, lse = attention_triton.forward(*qkv.unbind(1), *options)
        grads = [torch.empty_like(near[:, 0]) for _ in range(3)]
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(torch.ones_like(out), *inputs, *options, grads=tuple(grads))
        results.append([out, lse, *grads])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("width", "p", "dtype"),
    [
        (13, 0.0, torch.float32),
        (13, 0.3, torch.float32),
        (384, 0.3, torch.float32),
        (768, 0.3, torch.float16),
        (8192, 0.3, torch.float32),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm(width: int, p: float, dtype: torch.dtype, fused: bool, device: str) -> None:
    p = p if fused else 0.0
    # More rows than a program has; the widest take the interpreter long.  Of the tasks some have
    # no rows, and some rows have no task.
    num_rows, offsets = (150, (3, 70, 70, 71, 140)) if width < 8192 else (30, (0, 14, 14, 15, 28))
    x, residual, grad_out = torch.randn(3, num_rows, width, device=device).to(dtype)
    weight, bias, x_bias = torch.randn(3, width, device=device)
    weight = 1 + 0.2 * weight
    seed = torch.tensor(7, device=device)
    factors = dropout_factors(x.numel(), p, seed, 4).view_as(x)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        x_leaf, w, b, own_bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias, x_bias))
        h = x_leaf + 0 * own_bias
        if fused:
            h = residual.to(dtype) + (x_leaf + own_bias) * factors.to(dtype)
        out = F.layer_norm(h, (width,), w, b, 1e-12)
        (grad_x,) = torch.autograd.grad(out, x_leaf, grad_out.to(dtype), retain_graph=True)
        tasks = []
        for begin, end in pairwise(offsets):
            own = torch.zeros_like(out)
            own[begin:end] = grad_out[begin:end]
            grads = torch.autograd.grad(out, (w, b, own_bias), own, retain_graph=True)
            tasks.append(torch.cat(grads[: 3 if fused else 2]))
        return [out.detach(), grad_x, torch.stack(tasks)]

    options = (residual, x_bias, p, seed, 4) if fused else ()
    out, hidden, mean, rstd = layer_norm_triton.forward(x, weight, bias, 1e-12, *options)
    rows = torch.full((4, (3 if fused else 2) * width), torch.nan, device=device)
    own_rows = [*rows.split(width, 1), rows[:0]][:3]
    arguments = (grad_out, hidden, weight, mean, rstd, *own_rows, offsets)
    _, grad_x = layer_norm_triton.backward(*arguments, False, p, seed, 4)
    exact, torchs = reference(torch.float64), reference(dtype)
    for tensors in zip([out, grad_x, rows], torchs, exact, strict=True):
        assert_within_twice(*tensors)
    assert mean.dtype == rstd.dtype == torch.float32
    once = rows.clone()
    layer_norm_triton.backward(*arguments, True, p, seed, 4)
    torch.testing.assert_close(rows, 2 * once, rtol=1e-6, atol=0)


# One launch of the backward kernel runs eight tasks; the last two counts need two and three.
@pytest.mark.parametrize("num_tasks", [1, 8, 9, 19])
def test_layer_norm_of_many_tasks(num_tasks: int, device: str) -> None:
    lengths = torch.randint(0, 4, (num_tasks,)).tolist()
    lengths[-1] = 150  # more rows than a program has
    offsets = tuple(accumulate(lengths, initial=5))
    num_rows, width = offsets[-1] + 7, 24
    x, grad_out = torch.randn(2, num_rows, width, device=device)
    weight = torch.ones(width, device=device)
    out, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    buffer = torch.full((num_tasks, 3 * width + 5), torch.nan, device=device)
    rows = buffer[:, 5:].split(width, 1)
    arguments = (grad_out, hidden, weight, mean, rstd)
    grad, _ = layer_norm_triton.backward(*arguments, *rows, offsets, False)
    nothing = buffer.new_empty(0)
    plain, _ = layer_norm_triton.backward(*arguments, *(nothing,) * 3, (), False)
    assert torch.equal(grad, plain)
    for own, terms in zip(rows, (grad_out * out, grad_out, grad), strict=True):
        exact = [terms[begin:end].double().sum(0) for begin, end in pairwise(offsets)]
        # Sums of up to 150 terms, each rounded once before.
        torch.testing.assert_close(own.double(), torch.stack(exact), rtol=1e-5, atol=1e-5)
    assert buffer[:, :5].isnan().all()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_layer_norm_with_rows_for_one_parameter(wanted: int, device: str) -> None:
    x, grad_out = torch.randn(2, 40, 24, device=device)
    weight, nothing = torch.ones(24, device=device), x.new_empty(0)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    arguments = (grad_out, hidden, weight, mean, rstd)
    rows = torch.full((3, 2, 24), torch.nan, device=device)
    layer_norm_triton.backward(*arguments, *rows, (0, 11, 40), False)
    own = torch.full((2, 24), torch.nan, device=device)
    given = [own if place == wanted else nothing for place in range(3)]
    layer_norm_triton.backward(*arguments, *given, (0, 11, 40), False)
    assert torch.equal(own, rows[wanted])


def test_layer_norm_whose_weight_and_bias_are_one_parameter(device: str) -> None:
    x, grad_out = torch.randn(2, 40, 24, device=device)
    weight = torch.ones(24, device=device)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, weight, 1e-12)
    apart, one = torch.zeros(2, 2, 24, device=device), torch.zeros(2, 24, device=device)
    arguments = (grad_out, hidden, weight, mean, rstd)
    nothing, of_tasks = x.new_empty(0), ((0, 11, 40), True)
    layer_norm_triton.backward(*arguments, *apart, nothing, *of_tasks)
    layer_norm_triton.backward(*arguments, one, one, nothing, *of_tasks)
    torch.testing.assert_close(one, apart.sum(0))


def test_layer_norm_without_rows_has_sums_of_zero(device: str) -> None:
    x, weight = torch.randn(0, 24, device=device), torch.ones(24, device=device)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    rows = torch.full((3, 2, 24), torch.nan, device=device)
    layer_norm_triton.backward(x, hidden, weight, mean, rstd, *rows, (0, 0, 0), False)
    assert rows.count_nonzero() == 0


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


# A table of one row, whose run is longer than a piece of pieces; a few rows; words.
@pytest.mark.parametrize(("tokens", "table_rows"), [(1200, 1), (300, 3), (100, 1000), (0, 5)])
@pytest.mark.parametrize("width", [13, 200])
def test_embedding_task_gradients(tokens: int, table_rows: int, width: int, device: str) -> None:
    offsets = (2, tokens // 3, tokens // 3, tokens - 3) if tokens else (0, 0, 0, 0)
    index = torch.randint(0, table_rows, (tokens,), device=device)
    grad = torch.randn(tokens, width, device=device)
    rows = torch.ones(3, table_rows * width + 5, device=device)[:, 5:].unflatten(
        1, (table_rows, width)
    )
    expected = rows.double()
    torchs = rows.clone()
    for task, (begin, end) in enumerate(pairwise(offsets)):
        for result in (expected, torchs):
            source = grad[begin:end].to(result.dtype)
            result[task].index_put_((index[begin:end],), source, accumulate=True)
    embedding_triton.add_task_gradients_(grad, index, rows, offsets)
    assert_within_twice(rows, torchs, expected)


# A table of one row, whose run has more pieces than a piece has tokens; words, positions and token
# types of a few tasks; nothing.
PLANNED = {
    "one row": Lookups.of([1], (0, 1100), width=13),
    "three tables": Lookups.of([60, 40, 2], (2, 10, 10, 11, 90), behind=3, width=130),
    "nothing": Lookups.of([5, 2], (0, 0, 0), width=13),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lookups", PLANNED.values(), ids=list(PLANNED))
def test_planned_gradients(lookups: Lookups, dtype: torch.dtype, device: str) -> None:
    """By the 2x rule, and to the bit what the device finds without a plan."""
    grad = torch.randn(len(lookups.indices[0]), lookups.columns[0].shape[1], device=device)
    grad, plan = grad.to(dtype), lookups.plan().data.to(device)
    planned, by_table, unplanned, torchs, exact = (
        lookups.buffer(each).to(device) for each in [*[dtype] * 4, torch.float64]
    )
    add = lookup_plan_triton.add_planned_gradients_
    add(grad, plan, planned, lookups.layout, ALL_TABLES)
    for table, (index, each) in enumerate(zip(lookups.indices, lookups.columns, strict=True)):
        add(grad, plan, by_table, lookups.layout, table)
        index, columns = index.to(device), slice(each.start, each.stop)
        rows = unplanned[:, columns].unflatten(1, each.shape)
        embedding_triton.add_task_gradients_(grad, index, rows, lookups.offsets)
        for result in (torchs, exact):
            rows = result[:, columns].unflatten(1, each.shape)
            for task, (begin, end) in enumerate(pairwise(lookups.offsets)):
                own = grad[begin:end].to(result.dtype)
                rows[task].index_put_((index[begin:end],), own, accumulate=True)
    assert torch.equal(planned, unplanned)
    assert torch.equal(planned, by_table)
    assert_within_twice(planned, torchs, exact)


@pytest.mark.parametrize("lookups", PLANNED.values(), ids=list(PLANNED))
def test_planned_rows_are_zeroed(lookups: Lookups, device: str) -> None:
    plan, buffer = lookups.plan(), lookups.buffer(torch.float16)
    expected = buffer.clone()
    kernels.zero_planned_rows_(expected, plan, lookups.offsets)
    buffer, layout = buffer.to(device), lookups.layout
    lookup_plan_triton.zero_planned_rows_(buffer, plan.data.to(device), layout, plan.width)
    assert torch.equal(buffer.cpu(), expected)


@pytest.mark.parametrize("number", [-(2**40), -2, 999, 2**40])
def test_a_plan_leads_nowhere_beyond_its_tensors(number: int, device: str) -> None:
    """Wrong numbers in any place, which a GPU does not look at unless asked to."""
    lookups = Lookups.of([6, 3], (0, 4, 40), width=8)
    plan, layout = lookups.plan().data, lookups.layout
    around = torch.ones(3 * 2, lookups.columns[-1].stop, device=device)
    buffer = around[2:4]
    grad = torch.ones(3 * 40, 8, device=device)
    grad[:40] = grad[80:] = torch.nan
    places = [0, layout.places - 1]
    places += [
        layout.places + field * layout.records + record
        for field in range(4)
        for record in (0, layout.pieces[1] - 1, layout.pieces[-1], layout.records - 1)
    ]
    for place in places:
        wrong = plan.clone()
        wrong[place] = number
        wrong = wrong.to(device)
        add = lookup_plan_triton.add_planned_gradients_
        add(grad[40:80], wrong, buffer, layout, ALL_TABLES)
        lookup_plan_triton.zero_planned_rows_(buffer, wrong, layout, 8)
    assert (around[:2] == 1).all()
    assert (around[4:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [13, 1100])
@pytest.mark.parametrize("rows", [[], [4, 0, -1, 3], [-1, 5, 2**40, -(2**40)]], ids=str)
def test_take_rows(rows: list[int], width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, width, device=device).to(dtype).requires_grad_()
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    expected = take_rows_reference(x, index)
    grad_out = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, x, grad_out)
    assert torch.equal(take_rows_triton.forward(x.detach(), index), expected)
    assert torch.equal(take_rows_triton.backward(grad_out, index, 5), grad)


@pytest.mark.parametrize("count", [0, 3, 4096, 5001])
def test_dropout(count: int, device: str) -> None:
    x, seed = torch.randn(count, device=device), torch.tensor(-3, device=device)
    expected = x * dropout_factors(count, 0.3, seed, 2**32 - 1)
    assert torch.equal(dropout_triton.dropout(x, 0.3, seed, 2**32 - 1), expected)


# Tasks without rows at both ends and between, one row, primes, rows of no task before the first and
# behind the last.
LINEAR_OFFSETS = (3, 3, 4, 17, 17, 48, 48)
# Outputs and inputs on both sides of every tile's: thin, narrow, large; and multiples of nothing.
LINEAR_SHAPES = [(1, 7), (1, 96), (16, 130), (17, 33), (32, 32), (64, 72), (65, 144), (130, 65)]
LINEAR_CASES = [
    *((*shape, LINEAR_OFFSETS) for shape in LINEAR_SHAPES),
    (48, 80, (0, 64, 256)),  # multiples of every tile
    (5, 20, tuple(range(0, 70, 7))),  # more tasks than a launch has
    (72, 80, (5, 5, 5)),
]


@pytest.mark.parametrize(("outputs", "inputs", "offsets"), LINEAR_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_task_gradients(
    outputs: int, inputs: int, offsets: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(outputs, inputs, offsets, dtype, dtype, device)
    case.assert_within_twice(accumulate=False)
    case.assert_within_twice(accumulate=True)
    for one, other in zip(case.written(True), case.written(True), strict=True):
        assert torch.equal(one, other)


# Autocast's: products are rounded to the dtype of dy before they are widened.
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear_task_gradients_in_wider_rows(accumulate: bool, device: str) -> None:
    case = LinearCase(40, 72, LINEAR_OFFSETS, torch.float16, torch.float32, device)
    case.assert_within_twice(accumulate)
    if not accumulate:
        assert torch.equal(case.weight_rows.half().float(), case.weight_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", ["weight", "bias"])
def test_linear_task_gradients_of_one_parameter(
    wanted: str, dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(24, 40, LINEAR_OFFSETS, dtype, dtype, device)
    both = case.written(False)
    alone = case.written(False, wanted)
    # A bias by itself is summed by more warps, in another order.
    torch.testing.assert_close(alone, both[0 if wanted == "weight" else 1])
    assert case.buffer.isnan().sum() == case.buffer.numel() - alone.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_task_gradients_of_strided_streams(dtype: torch.dtype, device: str) -> None:
    case = LinearCase(72, 80, LINEAR_OFFSETS, dtype, dtype, device)
    expected = case.written(False)
    grad, x = case.streams
    nan = torch.full_like(grad, torch.nan)
    between = torch.stack([grad, nan], 2)[:, :, 0]
    inner = torch.cat([nan, grad, nan], 1)[:, 72:144]
    for case.streams in ((between, x), (inner, x), (grad.T.contiguous().T, x.T.contiguous().T)):
        for one, other in zip(case.written(False), expected, strict=True):
            assert torch.equal(one, other)
    one_row = grad[10:11]
    results = []
    for every in (one_row.expand_as(grad), one_row.repeat(len(grad), 1)):
        case.streams = (every, x)
        results.append(case.written(False))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# Kernels alone, torch and a kernel, torch alone.
@pytest.mark.parametrize(
    ("dtype", "rows_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_linear_task_gradients_by_what_the_operator_calls(
    dtype: torch.dtype, rows_dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(20, 36, LINEAR_OFFSETS, dtype, rows_dtype, device)
    expected = case.reference(dtype, accumulate=False)
    case.buffer.fill_(torch.nan)
    rows = (case.weight_rows, case.bias_rows)
    linear._task_gradients_cuda(*case.streams, *rows, case.offsets, False)
    for found, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=1e-3, atol=1e-5)


def test_linear_task_gradients_of_two_dtypes_under_autocast(device: str) -> None:
    case = LinearCase(20, 36, LINEAR_OFFSETS, torch.float16, torch.float32, device)
    expected = case.written(False)
    grad, x = case.streams
    case.buffer.fill_(torch.nan)
    rows = (case.weight_rows, case.bias_rows)
    with torch.autocast(device, torch.float16):
        linear._task_gradients_cuda(grad, x.float(), *rows, case.offsets, False)
    for found, wanted in zip(rows, expected, strict=True):
        assert torch.equal(found, wanted)


def test_linear_task_gradients_do_not_depend_on_the_other_tasks(device: str) -> None:
    case = LinearCase(72, 80, LINEAR_OFFSETS, torch.float32, torch.float32, device)
    weights, biases = case.written(False)
    for task, ends in enumerate(pairwise(case.offsets)):
        case.offsets = ends
        alone = case.written(False)
        assert torch.equal(alone[0][0], weights[task])
        assert torch.equal(alone[1][0], biases[task])


def test_linear_task_gradients_with_offsets_beyond_32_bits(device: str) -> None:
    """Rows of the streams and of the buffer 2^28 elements apart; nothing between is touched."""
    row, offsets = 2**28, (0, 4, 11)
    streams = torch.randn(2, 11, 32, device=device).half()
    near = torch.zeros(2, 32 * 32, device=device).half().view(2, 32, 32)
    with untouched_memory():
        far_streams, memory = torch.empty(2, 12 * row, dtype=torch.float16, device=device)
    far = far_streams.as_strided((2, 11, 32), (32, row, 1)).copy_(streams)
    far_rows = memory.as_strided((2, 32, 32), (10 * row, 32, 1))
    for (grad, x), rows in ((streams, near), (far, far_rows)):
        linear_triton.write_gradients_(grad, x, rows, rows.new_empty(0), offsets, False)
    assert torch.equal(far_rows, near)


class LinearCase:
    """One layer's streams, and a gradient buffer whose other columns stay NaN."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        offsets: tuple[int, ...],
        dtype: torch.dtype,
        rows_dtype: torch.dtype,
        device: str,
    ) -> None:
        self.sizes, self.offsets, self.dtype = (outputs, inputs), offsets, dtype
        self.draw(device)
        gap = 16
        columns = outputs * inputs + outputs + 2 * gap
        self.buffer = torch.empty(len(offsets) - 1, columns, dtype=rows_dtype, device=device)
        self._begin = gap

    def draw(self, device: torch.device | str) -> None:
        """Draw other streams; what belongs to no task does not count."""
        total = self.offsets[-1] + TAIL
        streams = [torch.randn(total, n, device=device).to(self.dtype) for n in self.sizes]
        for stream in streams:
            stream[: self.offsets[0]] = stream[self.offsets[-1] :] = torch.nan
        self.streams = tuple(streams)

    @property
    def weight_rows(self) -> Tensor:
        """``[K, O, I]``, in the middle of the buffer."""
        outputs, inputs = self.sizes
        rows = self.buffer[: len(self.offsets) - 1]
        return rows[:, self._begin :][:, : outputs * inputs].unflatten(1, self.sizes)

    @property
    def bias_rows(self) -> Tensor:
        """``[K, O]``, behind them."""
        begin = self._begin + self.sizes[0] * self.sizes[1]
        return self.buffer[: len(self.offsets) - 1, begin : begin + self.sizes[0]]

    def written(self, accumulate: bool, only: str = "") -> tuple[Tensor, Tensor] | Tensor:
        """What the kernels write into a buffer of NaN, or add to one of fours."""
        nothing = self.buffer.new_empty(0)
        self.buffer.fill_(4 if accumulate else torch.nan)
        rows = {"weight": self.weight_rows, "bias": self.bias_rows}
        given = [rows[name] if name == only or not only else nothing for name in rows]
        linear_triton.write_gradients_(*self.streams, *given, self.offsets, accumulate)
        clones = self.weight_rows.clone(), self.bias_rows.clone()
        return {"": clones, "weight": clones[0], "bias": clones[1]}[only]

    def reference(self, dtype: torch.dtype, accumulate: bool) -> list[Tensor]:
        """The same by torch, in this dtype."""
        streams = [stream.to(dtype) for stream in self.streams]
        rows_dtype = dtype if dtype == torch.float64 else self.buffer.dtype
        rows = [
            torch.full_like(x, 4 if accumulate else torch.nan, dtype=rows_dtype)
            for x in (self.weight_rows, self.bias_rows)
        ]
        linear.linear_task_gradients_reference_(*streams, *rows, self.offsets, accumulate)
        return rows

    def assert_within_twice(self, accumulate: bool) -> None:
        """Compare with float64 the largest errors of both, in a few draws."""
        found, torchs, exact = [], [], []
        for _ in range(4 if self.sizes[0] == 1 else 2):
            self.draw(self.buffer.device)
            found.append(self.written(accumulate))
            torchs.append(self.reference(self.dtype, accumulate))
            exact.append(self.reference(torch.float64, accumulate))
            # The columns beside the rows are not touched.
            rest = self.buffer.eq(4) if accumulate else self.buffer.isnan()
            assert rest.sum() >= self.buffer.numel() - sum(rows.numel() for rows in found[-1])
        assert_within_twice(
            *(
                torch.cat([rows.flatten() for draw in draws for rows in draw])
                for draws in (found, torchs, exact)
            )
        )


# Row sums of constants that are rounded, and a few columns.
@pytest.mark.parametrize("width", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm_of_nearly_constant_rows(
    fused: bool, dtype: torch.dtype, width: int, device: str
) -> None:
    x, residual = (torch.full((64, width), c, device=device) for c in (0.1, 0.3))
    eps = 1e-12 if dtype == torch.float32 else 1e-5  # 1e-12 is zero in float16, for torch
    if dtype == torch.float16:  # in float32 the sum itself is rounded, as torch's is
        noise = torch.finfo(dtype).eps * torch.randint(-1, 2, (32, width), device=device)
        x[:32] *= 1 + noise
    x, residual = x.to(dtype), residual.to(dtype)
    grad_out = (1e-3 * torch.randn(64, width, device=device)).to(dtype)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        h = leaf + residual.to(dtype) if fused else leaf
        out = F.layer_norm(h, (width,), eps=eps)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad_out.to(dtype))]

    options = (residual, None, 0.0, None, 0) if fused else ()
    out, *saved = layer_norm_triton.forward(x, None, None, eps, *options)
    hidden, mean, rstd = saved
    nothing = torch.empty(0, device=device)
    arguments = (grad_out, hidden, None, mean, rstd, *(nothing,) * 3, (), False)
    grad_x, _ = layer_norm_triton.backward(*arguments)
    for tensors in zip([out, grad_x], reference(dtype), reference(torch.float64), strict=True):
        assert_within_twice(*tensors)
