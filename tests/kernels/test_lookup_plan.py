"""Plans of lookups: what is in them, and that gradients by them are those without, to the bit."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import Columns, EmbeddingRows, LookupPlan, TaskRows, TaskSegments
from kernels.embedding.embedding import embedding_task_gradients_
from kernels.embedding.lookup_plan import ALL_TABLES, PIECE, Layout, add_planned_gradients_

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTH = 7
examples = settings(max_examples=60, deadline=None)


class Lookups(NamedTuple):
    """A batch's lookups in several tables, whose rows are columns of one buffer."""

    indices: Sequence[Tensor]
    columns: tuple[Columns, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(
        cls,
        entries: Sequence[int],
        offsets: tuple[int, ...],
        behind: int = 0,
        seed: int = 0,
        width: int = WIDTH,
    ) -> "Lookups":
        """Random ones; a third of the tokens look up row 0 of their table, as [CLS] does."""
        generator = torch.Generator().manual_seed(seed)
        tokens, indices = offsets[-1] + behind, []
        for rows in entries:
            index = torch.randint(0, rows, (tokens,), generator=generator)
            indices.append(index * (torch.rand(tokens, generator=generator) > 1 / 3))
        starts = accumulate((rows * width + 3 for rows in entries), initial=5)
        columns = tuple(Columns(s, (r, width)) for s, r in zip(starts, entries, strict=False))
        return cls(indices, columns, offsets)

    def plan(self) -> LookupPlan:
        return kernels.plan_lookups(*self)

    @property
    def layout(self) -> Layout:
        return Layout.of([each.shape[0] for each in self.columns], self.offsets)

    def buffer(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ones, to be added to."""
        return torch.ones(len(self.offsets) - 1, self.columns[-1].stop + 2, dtype=dtype)

    def unplanned(self, grad: Tensor, buffer: Tensor) -> Tensor:
        for index, each in zip(self.indices, self.columns, strict=True):
            rows = buffer[:, each.start : each.stop].unflatten(1, each.shape)
            embedding_task_gradients_(grad, index, rows, self.offsets)
        return buffer

    def planned(self, grad: Tensor, buffer: Tensor, *tables: int) -> Tensor:
        plan = self.plan()
        for table in tables or (ALL_TABLES,):
            add_planned_gradients_(grad, plan.data, buffer, plan.entries, self.offsets, table)
        return buffer


# One table of a row, whose long run has more pieces than a piece has tokens; BERT's three; a task
# without tokens, tokens before the first task and behind the last; nothing at all; many tasks.
GRID = [
    Lookups.of([1], (0, 1100)),
    Lookups.of([500, 40, 2], (0, 150, 150, 151, 290)),
    Lookups.of([90, 3], (4, 30, 200), behind=9),
    Lookups.of([5, 2], (0, 0, 0)),
    Lookups.of([9, 300], tuple(range(0, 65 * 33, 33))),
]


@pytest.mark.parametrize("lookups", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_those_without_a_plan(lookups: Lookups, dtype: torch.dtype) -> None:
    grad = torch.randn(len(lookups.indices[0]), WIDTH).to(dtype)
    expected = lookups.unplanned(grad, lookups.buffer(dtype))
    found = lookups.planned(grad, lookups.buffer(dtype))
    by_table = lookups.planned(grad, lookups.buffer(dtype), *range(len(lookups.columns)))
    assert torch.equal(found, by_table)
    if dtype == torch.float64:  # another order than the reference's
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    else:
        assert torch.equal(found, expected)


def test_gradients_err_at_most_twice_as_torchs() -> None:
    lookups = GRID[1]
    draws = torch.randn(4, len(lookups.indices[0]), WIDTH)
    results = []
    for dtype in (torch.float32, torch.float64):
        of_draws = []
        for grad in draws:
            buffer = lookups.buffer(dtype)
            for index, each in zip(lookups.indices, lookups.columns, strict=True):
                rows = buffer[:, each.start : each.stop].unflatten(1, each.shape)
                for task, (start, end) in enumerate(pairwise(lookups.offsets)):
                    own = grad[start:end].to(dtype)
                    rows[task].index_put_((index[start:end],), own, accumulate=True)
            of_draws.append(buffer)
        results.append(torch.stack(of_draws))
    found = torch.stack([lookups.planned(grad, lookups.buffer()) for grad in draws])
    assert_within_twice(found, *results)


@pytest.mark.parametrize("lookups", GRID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_zeroing_reaches_what_was_added_to_and_nothing_else(
    lookups: Lookups, dtype: torch.dtype
) -> None:
    ones = torch.ones(len(lookups.indices[0]), WIDTH, dtype=dtype)
    added = lookups.unplanned(ones, lookups.buffer(dtype)) != 1
    buffer = lookups.buffer(dtype)
    kernels.zero_planned_rows_(buffer, lookups.plan(), lookups.offsets)
    assert torch.equal(buffer == 0, added)


@st.composite
def drawn(draw: st.DrawFn) -> Lookups:
    counts = draw(
        st.lists(st.sampled_from([0, 1, 31, 32, 33, 65, 70, 150]), min_size=1, max_size=5)
    )
    entries = draw(st.lists(st.sampled_from([1, 2, 33, 400]), min_size=1, max_size=3))
    offsets = tuple(accumulate(counts, initial=draw(st.sampled_from([0, 3]))))
    return Lookups.of(entries, offsets, draw(st.sampled_from([0, 5])), draw(st.integers(0, 2**31)))


@given(drawn())
@examples
def test_every_token_is_in_one_piece_of_its_own_row(lookups: Lookups) -> None:
    layout, data = lookups.layout, lookups.plan().data.numpy()
    assert len(data) == layout.numel
    records = data[layout.places :].reshape(4, -1)
    assert (records[1] >= 0).all()
    slots: dict[int, list[int]] = {}
    written: dict[tuple[int, int], list[int]] = {}
    for number, (first, count, task, column) in enumerate(records.T.tolist()):
        if not count:
            continue
        if number < layout.pieces[-1]:
            assert count <= PIECE
            tokens = data[first : first + count].tolist()
            where = slots if task < 0 else written
            key = column if task < 0 else (task, column)
        else:
            tokens = [token for slot in range(first, first + count) for token in slots.pop(slot)]
            where, key = written, (task, column)
            assert len(tokens) > PIECE
        assert key not in where
        where[key] = tokens
    assert not slots, "pieces of no run"
    expected: dict[tuple[int, int], list[int]] = {}
    for index, each in zip(lookups.indices, lookups.columns, strict=True):
        for task, (start, end) in enumerate(pairwise(lookups.offsets)):
            for token in range(start, end):
                column = each.start + int(index[token]) * WIDTH
                expected.setdefault((task, column), []).append(token)
    assert written == expected


@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(1, 300))
@examples
def test_a_plan_has_as_many_records_as_any_batch_needs(counts: list[int], rows: int) -> None:
    """At the worst: as many rows as there are, each of one token, and the others all of one."""
    offsets = tuple(accumulate(counts, initial=0))
    layout = Layout.of([rows], offsets)
    for repeated in (1, 2, PIECE, PIECE + 1, 2 * PIECE + 1):
        index = torch.arange(offsets[-1]) // repeated % rows
        plan = kernels.plan_lookups([index], [Columns(0, (rows, 1))], offsets)
        assert plan.data.numel() == layout.numel
    pieces = sum(min(c, rows) + (c - min(c, rows)) // PIECE for c in counts)
    assert layout.pieces == (0, pieces)


def test_plans_of_one_shape_are_of_one_size() -> None:
    sizes = {Lookups.of([50, 20, 2], (0, 70, 200), seed=n).plan().data.shape for n in range(9)}
    assert len(sizes) == 1


def test_columns_and_tokens_beyond_32_bits() -> None:
    start = 2**40
    plan = kernels.plan_lookups([torch.tensor([3, 1])], [Columns(start, (4, 8))], (0, 2))
    records = plan.data[2:].view(4, -1)
    assert records[3].tolist() == [start + 8, start + 24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("frozen", ["", "position"])
def test_layers_take_plans(frozen: str, dtype: torch.dtype) -> None:
    """The three tables in one layer, and each in a layer of its own."""
    lookups = Lookups.of([50, 40, 2], (0, 70, 70, 90, 110), behind=4, width=8)
    names = ("word", "position", "token_type")
    tables = {
        name: torch.randn(*each.shape).to(dtype).requires_grad_(name != frozen)
        for name, each in zip(names, lookups.columns, strict=True)
    }
    norm = [torch.randn(8, dtype=dtype).requires_grad_() for _ in range(2)]
    segments, own = TaskSegments(lookups.offsets), [n != frozen for n in names]
    trained = [
        [x for x, is_own in zip(each, own, strict=True) if is_own]
        for each in (lookups.indices, lookups.columns)
    ]
    plan, end = kernels.plan_lookups(*trained, lookups.offsets), lookups.columns[-1].stop
    found = []
    for given_plan in (None, plan):
        buffer = torch.zeros(4, end + 16, dtype=dtype)
        rows = EmbeddingRows(
            *(
                TaskRows(buffer, each if is_own else None)
                for each, is_own in zip(lookups.columns, own, strict=True)
            ),
            TaskRows(buffer, Columns(end, (8,)), Columns(end + 8, (8,))),
        )
        given = {"rows": rows, "segments": segments, "plan": given_plan}
        out = kernels.embedding_layer_norm(*lookups.indices, *tables.values(), *norm, **given)
        out.square().sum().backward()
        for index, table, of_table in zip(lookups.indices, tables.values(), rows[:3], strict=True):
            if of_table.weight_columns:
                given = {"rows": of_table, "segments": segments, "plan": given_plan}
                kernels.embedding(index, table, **given).square().sum().backward()
        found.append(buffer)
        if given_plan is not None:
            again = buffer.clone()
            kernels.zero_planned_rows_(again, plan, lookups.offsets)
            assert again[:, :end].count_nonzero() == 0
            assert torch.equal(again[:, end:], buffer[:, end:])
    if dtype == torch.float64:
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(*found)


INDEX, TABLE = torch.tensor([0, 1, 2]), Columns(0, (3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], (0, 3)), "indices: expected one for each of at least one table"),
        (([INDEX], [TABLE, Columns(12, (3, 4))], (0, 3)), "indices: expected one for each"),
        (([INDEX, INDEX], [TABLE, Columns(12, (3, 5))], (0, 3)), "columns: expected .* one width"),
        (([INDEX, INDEX], [TABLE, TABLE], (0, 3)), "overlap; is a table looked up twice"),
        (([INDEX, INDEX], [TABLE, Columns(11, (3, 4))], (0, 3)), "overlap"),
        (([INDEX], [Columns(-1, (3, 4))], (0, 3)), "columns: expected at least"),
        (([INDEX], [TABLE], (0, 4)), "offsets: expected to ascend from 0 to 3"),
        (([INDEX], [TABLE], (2, 1)), "offsets: expected to ascend"),
        (
            ([INDEX + 1], [TABLE], (0, 3)),
            r"indices\[0\]: expected 0 <= index < 3, got 3 at pos.* 2",
        ),
        (([INDEX - 1], [TABLE], (0, 3)), r"indices\[0\]: expected 0 <= index < 3, got -1"),
        (([INDEX.int()], [TABLE], (0, 3)), r"indices\[0\]: expected int64"),
        (([INDEX.to("meta")], [TABLE], (0, 3)), r"indices\[0\]: expected on the CPU"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.plan_lookups(*arguments)


def test_plans_of_other_tables_and_batches_are_refused() -> None:
    lookups = Lookups.of([6, 3], (0, 20, 50))
    plan, buffer, grad = lookups.plan(), lookups.buffer(), torch.ones(50, WIDTH)
    with pytest.raises(ValueError, match="plan: expected the shape"):
        kernels.zero_planned_rows_(buffer, plan, (0, 20, 49))
    with pytest.raises(ValueError, match="plan: expected the shape"):
        add_planned_gradients_(grad, plan.data, buffer, (6, 4), lookups.offsets)
    with pytest.raises(ValueError, match="table: expected -1 to 1, got 2"):
        add_planned_gradients_(grad, plan.data, buffer, (6, 3), lookups.offsets, 2)
    weight = torch.randn(6, WIDTH, requires_grad=True)
    rows, segments = TaskRows(buffer, Columns(1, (6, WIDTH))), TaskSegments(lookups.offsets)
    index = lookups.indices[0]
    with pytest.raises(ValueError, match=r"plan: expected one for Columns\(start=1"):
        kernels.embedding(index, weight, rows=rows, segments=segments, plan=plan)
    with pytest.raises(ValueError, match="plan: of no use without rows"):
        kernels.embedding(index, weight, plan=plan)
    tables = (weight,) * 3
    norm = torch.ones(WIDTH, requires_grad=True)
    with pytest.raises(ValueError, match="plan: of no use without rows"):
        kernels.embedding_layer_norm(index, index, index, *tables, norm, None, plan=plan)
    of_all = EmbeddingRows(rows, rows, rows, TaskRows(buffer, Columns(44, (WIDTH,))))
    with pytest.raises(ValueError, match="plan: expected one for"):
        kernels.embedding_layer_norm(
            *(index, index, index, *tables, norm, None),
            rows=of_all,
            segments=segments,
            plan=plan,
        )


@pytest.mark.parametrize("number", [-2, 10**6, 2**62])
@pytest.mark.parametrize("field", range(5))
def test_numbers_that_lead_beyond_a_tensor_are_refused_on_the_cpu(field: int, number: int) -> None:
    lookups = Lookups.of([6, 3], (0, 20, 150))
    plan, layout = lookups.plan(), lookups.layout
    records = plan.data[layout.places :].view(4, -1)
    used = np.flatnonzero((records[1] > 0).numpy())
    for place in (used[0], used[-1]):
        wrong = plan.data.clone()
        at = layout.places + (field - 1) * layout.records + place if field else place
        wrong[at] = number
        with pytest.raises(ValueError, match=r"plan: expected for .* 0 <= index < \d+, got"):
            add_planned_gradients_(
                torch.ones(150, WIDTH), wrong, lookups.buffer(), plan.entries, lookups.offsets
            )
