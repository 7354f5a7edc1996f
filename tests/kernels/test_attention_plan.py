"""Plans of attention: the operator, its bound, and what functions do with one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import (
    AttentionPlan,
    attention_plan,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from kernels.attention.attention_plan import (
    RUN_ALIGNMENT,
    RUN_TOKENS,
    SURELY_SHORT,
    attention_plan_reference,
    max_runs,
)

from .attention_lengths import RUNS, boundaries

EDGES = st.sampled_from([0, 1, 2, 3, 30, 31, 32, 60, 61, 62, 63, 64, 65, 66, 128, 200])


@given(st.lists(EDGES, max_size=60), st.integers(0, 200))
def test_runs_hold_whole_sequences_and_all_rows_but_long_ones(
    lengths: list[int], tail: int
) -> None:
    cu_seqlens = boundaries(lengths)
    total = sum(lengths) + tail
    plan = attention_plan(cu_seqlens, total)
    assert all(map(torch.equal, plan, attention_plan_reference(cu_seqlens, total)))
    covered = torch.zeros(total, dtype=torch.int64)
    found = [run for run in plan.runs.tolist() if run != [0, 0]]
    assert plan.runs[len(found) :].count_nonzero() == 0
    for begin, end in found:
        assert end - begin // RUN_ALIGNMENT * RUN_ALIGNMENT <= RUN_TOKENS
        covered[begin:end] += 1
    starts = cu_seqlens.tolist()
    for start, stop in pairwise(starts):
        assert plan.bounds[:, start:stop].T.tolist() == [[start, stop]] * (stop - start)
        is_short = stop - start // RUN_ALIGNMENT * RUN_ALIGNMENT <= RUN_TOKENS
        assert is_short or stop - start > SURELY_SHORT
        assert (covered[start:stop] == is_short).all()
        assert stop - start < 2 or not any(start < begin < stop for begin, _ in found)
    assert plan.bounds[:, starts[-1] :].count_nonzero() == 0
    assert (covered[starts[-1] :] == 1).all()


def test_the_bound_is_nearly_met() -> None:
    """Each begins 3 behind a multiple of 4, so that no two share a run."""
    lengths = [3, *[32] * 40]
    runs = attention_plan(boundaries(lengths), sum(lengths)).runs
    found = int((runs[:, 1] > 0).sum())
    assert 0.9 * max_runs(sum(lengths)) < found <= max_runs(sum(lengths))


def qkv(total: int) -> Tensor:
    return torch.randn(total, 3, 2, 16)


@pytest.mark.parametrize("name", RUNS)
def test_functions_give_the_same_with_a_plan(name: str) -> None:
    cu, total = boundaries(RUNS[name]), sum(RUNS[name]) + 3
    plan, longest = attention_plan(cu, total), max(RUNS[name], default=0)
    x = qkv(total).requires_grad_()
    packed = [
        flash_attn_varlen_qkvpacked_func(x, cu, longest, plan=given) for given in (None, plan)
    ]
    apart = flash_attn_varlen_func(*x.unbind(1), cu, cu, longest, longest, plan=plan)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (*packed, apart)]
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], apart)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: attention_plan(boundaries([5, 4]), 40), "runs: expected the shape"),
        (lambda plan: plan._replace(bounds=plan.bounds[:, :5]), "bounds: expected the shape"),
        (lambda plan: plan._replace(runs=plan.runs.long()), "runs: expected int32"),
        (lambda plan: plan._replace(bounds=None), "both or neither"),
        (
            lambda plan: plan._replace(bounds=plan.bounds.T.contiguous().T),
            "bounds: expected contiguous",
        ),
        (lambda plan: AttentionPlan(*(x.to("meta") for x in plan)), "runs: expected on cpu"),
    ],
)
def test_plans_of_other_streams_are_refused(change: object, message: str) -> None:
    cu = boundaries([5, 4])
    plan = change(attention_plan(cu, 9))
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_qkvpacked_func(qkv(9), cu, 5, plan=plan)


def test_a_plan_is_of_self_attention() -> None:
    cu, (q, k, v) = boundaries([5, 4]), qkv(9).unbind(1)
    plan = attention_plan(cu, 9)
    with pytest.raises(ValueError, match="plan: is of self-attention"):
        flash_attn_varlen_func(q, k, v, cu, cu.clone(), 5, 5, plan=plan)
    with pytest.raises(ValueError, match="runs: a plan is of self-attention"):
        flash_attn_varlen_func(q, *torch.randn(2, 10, 2, 16), cu, cu, 5, 5, plan=plan)


def test_wrong_boundaries_are_refused() -> None:
    for wrong in ([0, 5, 3], [1, 2], [0, 10]):
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            attention_plan(torch.tensor(wrong, dtype=torch.int32), 9)
    with pytest.raises(ValueError, match="total: expected"):
        attention_plan(boundaries([1]), 2**30 + 1)
