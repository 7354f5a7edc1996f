"""Gram matrix, combination and the fused AdamW step against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels.surgery.surgery import (
    combine,
    combine_adamw_,
    combine_adamw_reference_,
    combine_adamw_segments_,
    combine_reference,
    gram,
    gram_reference,
)

from .tolerance import assert_within_twice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One task, the demo's three, one over a 4-row tile, two full tiles, a full panel of tiles.
TASKS = [1, 2, 3, 5, 8, 64]
# Nothing, one, around a vector (4, 8 or 16 lanes), around a block of 2048, several threads.
COLUMNS = [0, 1, 15, 16, 17, 2047, 2049, 70_001]


def task_rows(num_tasks: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gradients of ordinary size that partly agree, in rows longer than they need to be."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(columns, generator=generator)
    own = torch.randn(num_tasks, columns, generator=generator)
    buffer = torch.empty(num_tasks, columns + 3, dtype=dtype)
    rows = buffer[:, 2 : columns + 2]  # no row starts at a multiple of 16 bytes
    return rows.copy_(0.02 * (own + 0.5 * shared))


def shapes(num_tasks: int) -> list[tuple[int, range]]:
    """Columns to test and the seeds to test them with.

    One small sum may by luck come out exact in torch; the largest error of many may not.
    """
    columns = COLUMNS if num_tasks < 64 else [17, 2049]
    return [(count, range(32 if count < 100 else 4)) for count in columns]


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_tasks", TASKS)
def test_gram(num_tasks: int, dtype: torch.dtype) -> None:
    for columns, seeds in shapes(num_tasks):
        batches = [task_rows(num_tasks, columns, dtype, seed) for seed in seeds]
        results = torch.stack([gram(rows) for rows in batches])
        plain = torch.stack([gram_reference(rows, [0, columns])[0] for rows in batches])
        exact = torch.stack([rows.double() @ rows.double().T for rows in batches])
        assert results.dtype == plain.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(results, exact, rtol=1e-12, atol=1e-15)
        else:
            assert_within_twice(results, plain, exact)
        assert torch.equal(results, results.mT)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("special", [None, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tasks", [1, 3, 4, 9])
def test_gram_of_16_bits_has_the_bits_of_float32(
    num_tasks: int, dtype: torch.dtype, special: float | None
) -> None:
    # Around a cache line (32 elements), a chain (128, 256 or 512 columns) and a block of 2048.
    for columns in (1, 31, 32, 33, 127, 129, 257, 511, 513, 2047, 2049, 4129):
        rows = task_rows(num_tasks, columns, dtype)
        if special is not None:
            rows[num_tasks // 2, columns // 2] = special
        result, wide = gram(rows), gram(rows.float())
        torch.testing.assert_close(result, wide, rtol=0, atol=0, equal_nan=True)
        assert result.isfinite().all() == (special is None)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e-20, 1e-19, 1e-18, 1.0, 5e16])
def test_gram_of_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    # Squares of 1e-19 and less are below float32's normal numbers, though many of their sums are
    # normal; those of 1e-25 are zero.  The sums of 5e16 are near float32's largest number.
    rows = (50 * scale * task_rows(3, 70_001, torch.float32)).to(dtype)
    exact = rows.double() @ rows.double().T
    assert_within_twice(gram(rows), gram_reference(rows, [0, 70_001])[0], exact)


def test_gram_by_segment() -> None:
    rows = task_rows(3, 5000, torch.float32)
    offsets = [7, 7, 20, 4999, 5000]
    result = gram(rows, offsets)
    assert_within_twice(
        result, gram_reference(rows, offsets), gram_reference(rows.double(), offsets)
    )
    assert torch.equal(result[0], torch.zeros(3, 3))


def test_gram_error_does_not_grow_with_the_columns() -> None:
    # Values of one sign, where a running float32 sum loses digits as it grows.  Ours adds chains of
    # 32, at most 16 of them in a block, and blocks in float64: whatever the number of columns, a
    # product meets fewer than 32 + 16 + 4 additions, each off by at most half an epsilon (6e-8).
    for columns in (1 << 12, 1 << 23):
        rows = torch.rand(1, columns, generator=torch.Generator().manual_seed(1))
        exact = rows.double().square().sum()
        assert abs(gram(rows)[0, 0].double() - exact) < 52 * 6e-8 * exact


def test_more_columns_than_32_bits_count() -> None:
    # Pages of zeros that are only read take no memory: 4 GiB of bfloat16 cost a few pages.
    columns = 2**31 + 70
    flat = torch.from_numpy(np.zeros(columns, dtype=np.int16)).view(torch.bfloat16)
    rows = flat[None]
    ends = [0, 5, 2**31 - 1, 2**31, 2**31 + 69]
    rows[0, ends] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.bfloat16)
    assert gram(rows).tolist() == [[341.0]]
    assert gram(rows, [6, 2**31, columns]).flatten().tolist() == [16.0, 64.0 + 256.0]
    tail = combine(rows[:, 2**31 - 4 :], torch.tensor([2.0]))
    assert tail.nonzero().flatten().tolist() == [3, 4, 73]


def test_same_bits_for_any_number_of_threads() -> None:
    rows = task_rows(3, 300_001, torch.float32)
    weights = torch.tensor([0.5, 1.5, -1.0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((gram(rows), combine(rows, weights)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, results[0][0]) and torch.equal(c, results[0][1]) for g, c in results)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_tasks", TASKS)
def test_combine(num_tasks: int, dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.linspace(-1.5, 2.0, num_tasks, dtype=compute)
    for columns, seeds in shapes(num_tasks):
        batches = [task_rows(num_tasks, columns, dtype, seed) for seed in seeds]
        results = torch.stack([combine(rows, weights) for rows in batches])
        plain = torch.stack([combine_reference(rows, weights) for rows in batches])
        exact = torch.stack([weights.double() @ rows.double() for rows in batches])
        assert results.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(results, exact, rtol=1e-12, atol=1e-15)
        else:
            assert_within_twice(results, plain, exact)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_into(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    rows, weights = task_rows(3, 2049, dtype), torch.tensor([1.0, -0.3, 2.0])
    out = torch.full((2049,), torch.nan, dtype=out_dtype)
    assert combine(rows, weights, out) is out
    plain = (weights @ rows.float()).to(out_dtype)
    assert_within_twice(out, plain, weights.double() @ rows.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("vector_unit")
def test_sixteen_bit_values_round_as_torch_does(dtype: torch.dtype) -> None:
    # Every 16-bit pattern is a row value; with weights below one the results need rounding.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = patterns[None]
    for weight in (1.0, 0.7, 1e-3):
        weights = torch.tensor([weight])
        expected = (weights[:, None] * rows.float()).sum(0).to(dtype)
        torch.testing.assert_close(combine(rows, weights), expected, rtol=0, atol=0, equal_nan=True)


def fresh_state(columns: int, dtype: torch.dtype, copy: torch.dtype | None) -> list[Tensor | None]:
    master = torch.randn(columns, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return [
        master,
        torch.zeros_like(master),
        torch.zeros_like(master),
        None if copy is None else master.to(copy),
    ]


@pytest.mark.usefixtures("vector_unit")
def test_adamw_is_torchs_in_float64() -> None:
    columns, weights = 4099, torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)
    state = fresh_state(columns, torch.float64, None)
    parameter = torch.nn.Parameter(state[0].clone())
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.8, 0.99), eps=1e-6)
    for step in range(1, 6):
        # Multiples of 2^-20 and powers of two: their sum is exact in any order.  A rounding of it,
        # where gradients cancel, would come out of AdamW up to lr / eps times as large.
        rows = task_rows(3, columns, torch.float64, seed=step).mul(2**20).round().div(2**20)
        parameter.grad = 0.125 * (weights @ rows)
        optimizer.step()
        scale = torch.tensor(0.125, dtype=torch.float64)
        combine_adamw_(
            rows, weights, *state, lr=3e-3, step=step, betas=(0.8, 0.99), eps=1e-6, scale=scale
        )
    torch.testing.assert_close(state[0], parameter.data, rtol=1e-12, atol=1e-14)
    moments = optimizer.state[parameter]
    torch.testing.assert_close(state[1], moments["exp_avg"], rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(state[2], moments["exp_avg_sq"], rtol=1e-12, atol=1e-18)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_in_float32(dtype: torch.dtype, copy: torch.dtype | None) -> None:
    columns, weights = 4099, torch.tensor([1.0, 0.5, -0.25])
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    state = fresh_state(columns, torch.float32, copy)
    single = torch.nn.Parameter(state[0].clone())
    double = torch.nn.Parameter(state[0].double())
    optimizers = [torch.optim.AdamW([p], **settings) for p in (single, double)]
    for step in range(1, 4):
        rows = task_rows(3, columns, dtype, seed=step)
        single.grad = weights @ rows.float()
        double.grad = weights.double() @ rows.double()
        for optimizer in optimizers:
            optimizer.step()
        combine_adamw_(rows, weights, *state, step=step, **settings)
    assert_within_twice(state[0], single, double)
    for name, moment in (("exp_avg", state[1]), ("exp_avg_sq", state[2])):
        exact = optimizers[1].state[double][name]
        assert_within_twice(moment, optimizers[0].state[single][name], exact)
    if copy is not None:
        assert torch.equal(state[3], state[0].to(copy))


def test_adamw_on_slices_of_columns() -> None:
    rows, weights = task_rows(3, 1000, torch.float32), torch.ones(3)
    whole, parts = fresh_state(1000, torch.float32, None), fresh_state(1000, torch.float32, None)
    combine_adamw_(rows, weights, *whole, lr=1e-2, step=1, weight_decay=0.0)
    for columns in (slice(0, 333), slice(333, 1000)):
        part = [None if s is None else s[columns] for s in parts]
        combine_adamw_(rows[:, columns], weights, *part, lr=1e-2, step=1, weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ends", "groups", "decayed"),
    [
        ([70_001], [1], None),
        ([64, 40_000, 40_000, 70_001], [1, -1, 0, 2], 50_000),
        ([1, 3, 35_003, 70_001], [0, 2, 0, 1], 0),
        ([*range(0, 70_000, 1000), 70_001], [n % 4 - 1 for n in range(71)], 12_345),
    ],
)
def test_adamw_by_segments_is_adamw_of_each(
    dtype: torch.dtype, ends: list[int], groups: list[int], decayed: int | None
) -> None:
    """To the bit, however threads share the columns; those of group -1 stay as they are."""
    rows, weights = task_rows(3, 70_001, dtype), torch.randn(3, 3)
    together, each = (fresh_state(70_001, torch.float32, None) for _ in range(2))
    options = {"lr": 1e-2, "step": 2, "scale": torch.tensor(0.5)}
    combine_adamw_segments_(
        *(rows, weights, *together),
        **{"ends": ends, "groups": groups, "decayed": decayed, "weight_decay": 0.1, **options},
    )
    for begin, end, group in zip([0, *ends], ends, groups, strict=False):
        border = end if decayed is None else min(max(begin, decayed), end)
        for own, decay in ((slice(begin, border), 0.1), (slice(border, end), 0.0)):
            if group >= 0:
                part = [None if s is None else s[own] for s in each]
                combine_adamw_(rows[:, own], weights[group], *part, weight_decay=decay, **options)
    assert all(torch.equal(a, b) for a, b in zip(together[:3], each[:3], strict=True))


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(1.0)])
def test_adamw_skips(flag: Tensor) -> None:
    rows = torch.full((3, 100), torch.nan)
    state = fresh_state(100, torch.float32, torch.bfloat16)
    before = [s.clone() for s in state]
    combine_adamw_(rows, torch.ones(3), *state, lr=1e-2, step=0, skip=flag)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    rows = task_rows(3, 100, torch.float32)
    combine_adamw_(rows, torch.ones(3), *state, lr=1e-2, step=1, skip=torch.zeros_like(flag))
    assert not torch.equal(state[0], before[0])


@pytest.mark.parametrize("skip", [None, torch.tensor(False), torch.tensor(True)])
def test_adamw_reference_is_the_operator(skip: Tensor | None) -> None:
    rows, weights = task_rows(3, 500, torch.float64), torch.ones(3, dtype=torch.float64)
    states = [fresh_state(500, torch.float64, None) for _ in range(2)]
    lr, step, scale = torch.tensor(1e-2), torch.tensor(7), torch.tensor(0.5)
    combine_adamw_(rows, weights, *states[0], lr=lr, step=step, scale=scale, skip=skip)
    combine_adamw_reference_(
        rows, weights, *states[1], lr, step, scale, skip, 0.9, 0.999, 1e-8, 0.01
    )
    for ours, reference in zip(states[0][:3], states[1][:3], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-15)


BAD_ROWS = {
    "one dimension": (torch.zeros(3), r"rows must have the shape \[K, P\]"),
    "no tasks": (torch.zeros(0, 3), "rows must hold at least one task gradient"),
    "integers": (torch.zeros(3, 3, dtype=torch.int64), "rows must be float32"),
    "columns apart": (torch.zeros(3, 8)[:, ::2], "contiguous columns"),
    "overlapping": (torch.zeros(1, 8).expand(3, 8), "must not overlap"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str) -> None:
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        gram(rows)
    with pytest.raises(ValueError, match=message):
        combine(rows, torch.ones(rows.shape[0]))


def test_bad_neighbours_of_the_rows() -> None:
    rows, weights = torch.zeros(3, 8), torch.ones(3)
    for offsets in ([], [0], [-1, 8], [0, 9], [0, 5, 4, 8]):
        with pytest.raises(ValueError, match="offsets must"):
            gram(rows, offsets)
    for bad in (torch.ones(4), torch.ones(3).double(), torch.ones(6)[::2], torch.ones(3, 1)):
        with pytest.raises(ValueError, match="weights must"):
            combine(rows, bad)
    for bad in (torch.ones(9), torch.ones(8).double(), torch.ones(16)[::2]):
        with pytest.raises(ValueError, match="out must"):
            combine(rows, weights, bad)


@pytest.mark.parametrize("argument", ["master", "exp_avg", "exp_avg_sq", "low_precision"])
def test_bad_adamw_state(argument: str) -> None:
    rows, weights = torch.zeros(3, 8), torch.ones(3)
    good = {name: torch.zeros(8) for name in ("master", "exp_avg", "exp_avg_sq")}
    good["low_precision"] = torch.zeros(8, dtype=torch.bfloat16)
    bad_type = torch.zeros(8, dtype=torch.float64)
    for bad in (torch.zeros(9, dtype=good[argument].dtype), bad_type):
        with pytest.raises(ValueError, match=f"{argument} must"):
            combine_adamw_(rows, weights, **(good | {argument: bad}), lr=1e-3, step=1)


@pytest.mark.parametrize("argument", ["lr", "step", "scale", "skip"])
def test_bad_adamw_scalars(argument: str) -> None:
    state = [torch.zeros(8) for _ in range(3)]
    settings = {"lr": 1e-3, "step": 1} | {argument: torch.ones(2)}
    with pytest.raises(ValueError, match=f"{argument} must be one number"):
        combine_adamw_(torch.zeros(3, 8), torch.ones(3), *state, **settings)


def test_nothing_is_allocated_beyond_the_result() -> None:
    columns = 100_000
    rows, weights = task_rows(3, columns, torch.float32), torch.tensor([1.0, 0.5, -0.25])
    state = fresh_state(columns, torch.float32, torch.bfloat16)
    scalars = {"lr": torch.tensor(1e-3), "step": torch.tensor(1)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gram(rows)
        combine(rows, weights)
        combine_adamw_(rows, weights, *state, **scalars)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events())
    result = 4 * columns
    assert result <= allocated < result + 4096


@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 7]])
def test_gram_and_combine_can_be_differentiated(offsets: list[int] | None) -> None:
    rows = task_rows(3, 7, torch.float64).requires_grad_()
    weights = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda r: gram(r, offsets), rows)
    torch.autograd.gradcheck(combine, (rows, weights))
