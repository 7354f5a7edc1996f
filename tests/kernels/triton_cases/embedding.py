"""The Triton kernels of embeddings' gradients, planned and not."""

from itertools import pairwise

import pytest
import torch

import kernels
from kernels.embedding import embedding_triton, lookup_plan_triton
from kernels.embedding.lookup_plan import ALL_TABLES

from ..test_lookup_plan import Lookups
from ..tolerance import assert_within_twice


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
