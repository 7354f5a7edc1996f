"""Attention's Triton kernels for runs of short sequences, and for plans."""

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_plan_triton, attention_runs_triton, attention_triton
from kernels.attention.attention_options import AttentionOptions
from kernels.attention.attention_plan import (
    AttentionPlan,
    attention_plan,
    attention_plan_reference,
    max_runs,
)

from ..attention_case import TAIL, AttentionCase, boundaries
from ..attention_lengths import NO_WINDOW, RUNS, Window
from ..tolerance import assert_within_twice


@pytest.mark.parametrize(
    ("causal", "width", "p", "dtype", "window"),
    [
        (False, 32, 0.2, torch.float32, NO_WINDOW),
        (True, 20, 0.0, torch.float32, NO_WINDOW),
        (True, 64, 0.2, torch.float16, NO_WINDOW),
        (False, 96, 0.0, torch.float16, NO_WINDOW),
        (False, 32, 0.2, torch.float32, (3, 5)),
        (True, 32, 0.0, torch.float16, (16, -1)),
    ],
)
def test_attention_in_runs(
    causal: bool, width: int, p: float, dtype: torch.dtype, window: Window, device: str
) -> None:
    found: list[list[Tensor]] = []
    torchs: list[list[Tensor]] = []
    exact: list[list[Tensor]] = []
    for lengths, tail in [*((lengths, TAIL) for lengths in RUNS.values()), ([3], 70)]:
        case = AttentionCase(lengths, lengths, causal, width, p, dtype, device, tail, window)
        found.append(case.run())
        torchs.append(case.reference(dtype))
        exact.append(case.reference(torch.float64))
    for results in zip(
        *(zip(*cases, strict=True) for cases in (found, torchs, exact)), strict=True
    ):
        assert_within_twice(*(torch.cat([x.flatten() for x in parts]) for parts in results))


@pytest.mark.parametrize("window", [NO_WINDOW, (9, 4)])
@pytest.mark.parametrize("lengths", [RUNS["long and short"], [18, 1, 0, 23, 17, 60, 3]])
def test_attention_is_the_same_by_runs_and_by_tiles(
    lengths: list[int], window: Window, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same dropped weights: others would show."""
    causal = window == NO_WINDOW
    case = AttentionCase(lengths, lengths, causal, 32, 0.5, torch.float32, device, window=window)
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


@pytest.mark.parametrize("window", [NO_WINDOW, (2, 9), (-1, 2)])
@pytest.mark.parametrize("value", [-(2**31), -7, 5, 2**31 - 1])
def test_attention_stays_inside_its_tensors_with_a_wrong_plan(
    value: int, window: Window, device: str
) -> None:
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
        options = (cu_seqlens, cu_seqlens, AttentionOptions(0.2, value == 5, 0.0, 0, *window))
        out, lse = attention_triton.forward(*qkv.unbind(1), *options, plan=plan)
        grads = torch.full_like(memory, torch.nan)
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(
            torch.ones_like(out), *inputs, *options, grads=grads[20:60].unbind(1), plan=plan
        )
        assert grads[:20].isnan().all()
        assert grads[60:].isnan().all()
