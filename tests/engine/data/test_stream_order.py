"""The order of a stream: every row once an epoch, ranks apart, and the same from any place on."""

import gc
from itertools import islice
from pathlib import Path

import pytest

from engine.data.stream_order import Block, Place, StreamOrder
from engine.utils.errors import InputError

from .streams import order_of, write_numbered


def number_of(row) -> int:
    return int(row.values[0].removeprefix("number "))


def epoch_of(order: StreamOrder, epoch: int = 0) -> list[int]:
    """The numbers of the rows of an epoch, in their order."""
    rows = []
    for block in order.blocks(Place(epoch)):
        if block.place.epoch > epoch:
            return rows
        rows += map(number_of, block.rows)
    raise AssertionError("streams have no end")


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize("size", [1, 10, 64, 1000])
@pytest.mark.parametrize("sizes", [[50], [20, 1, 30, 9], [5] * 23])
def test_an_epoch_has_every_row_once(tmp_path: Path, sizes, size, ending) -> None:
    order = order_of(write_numbered(tmp_path / "set", sizes, ending=ending), size)
    first, second = epoch_of(order), epoch_of(order, 1)
    assert sorted(first) == sorted(second) == list(range(sum(sizes)))
    if size > 1 or len(sizes) > 1:
        assert first != second
        assert first != sorted(first)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_files_of_csv_are_read_alike(tmp_path: Path) -> None:
    """The library leaves one open that is not read to its end, until it is collected."""
    csv = order_of(write_numbered(tmp_path / "csv", [20, 9], ending=".csv"), 10)
    found = epoch_of(csv)
    del csv
    gc.collect()
    assert found == epoch_of(order_of(write_numbered(tmp_path / "set", [20, 9]), 10))


@pytest.mark.parametrize("sizes", [[7], [9, 12], [5, 8, 3, 10], [6] * 24])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_every_row_once_together(tmp_path: Path, sizes, ranks) -> None:
    """Of two or 24 files ranks read their own, of others one row in R."""
    folder = write_numbered(tmp_path / "set", sizes)
    for epoch in (0, 1):
        found = [epoch_of(order_of(folder, 4, (rank, ranks)), epoch) for rank in range(ranks)]
        assert sorted(number for own in found for number in own) == list(range(sum(sizes)))
        assert all(found)


def test_the_shards_are_those_of_the_library(tmp_path: Path) -> None:
    """Where their number allows it each rank reads files of its own, and no others."""
    folder = write_numbered(tmp_path / "set", [10] * 4)
    own = [{number // 10 for number in epoch_of(order_of(folder, 4, (r, 2)))} for r in range(2)]
    assert len(own[0]) == len(own[1]) == 2
    assert own[0].isdisjoint(own[1])


@pytest.mark.parametrize("shard", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_any_place_is_gone_on_from(tmp_path: Path, size, shard) -> None:
    order = order_of(write_numbered(tmp_path / "set", [20, 1, 30, 9]), size, shard)
    known = list(islice(order.blocks(Place()), 70))
    assert known[-1].place.epoch >= 1
    for number in range(0, 66, 13):
        again = list(islice(order.blocks(known[number].place), 4))
        assert again == known[number : number + 4]


def test_a_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "set", [30, 30])
    assert epoch_of(order_of(folder, 16)) == epoch_of(order_of(folder, 16))
    assert epoch_of(order_of(folder, 16)) != epoch_of(order_of(folder, 16, seed=1))


def test_rows_of_several_files_are_in_a_block(tmp_path: Path) -> None:
    """Files may be sorted by their labels."""
    order = order_of(write_numbered(tmp_path / "set", [100] * 5), 50)
    block = next(order.blocks(Place()))
    assert {number_of(row) // 100 for row in block.rows} == set(range(5))


def test_a_row_is_named_by_its_file(tmp_path: Path) -> None:
    order = order_of(write_numbered(tmp_path / "set", [9, 9], ending=".jsonl"), 5)
    for block in islice(order.blocks(Place()), 6):
        for row in block.rows:
            file, number = divmod(number_of(row), 9)
            assert row.place == (
                f"data set {tmp_path / 'set'}, split train, "
                f"train-{file:05}-of-00002.jsonl, row {number}"
            )


PROMISE = """---
dataset_info:
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype: int64
  splits:
  - name: train
    num_examples: {}
---
"""


@pytest.mark.parametrize(("shard", "ends_early"), [((0, 1), True), ((1, 3), True), ((0, 2), False)])
def test_a_stream_that_ends_early(tmp_path: Path, shard, ends_early) -> None:
    """Of two ranks with a file each, none has counted all."""
    folder = write_numbered(tmp_path / "set", [9, 9])
    (folder / "README.md").write_text(PROMISE.format(20))
    if not ends_early:
        assert len(epoch_of(order_of(folder, 5, shard))) == 9
        return
    message = r"data set .*, split train: ends behind 18 rows, its README.md says 20; see that"
    with pytest.raises(InputError, match=message):
        epoch_of(order_of(folder, 5, shard))


@pytest.mark.parametrize("promised", [-10, "many", 1.5, "[3]"])
def test_a_promise_that_is_no_number_of_rows(tmp_path: Path, promised) -> None:
    folder = write_numbered(tmp_path / "set", [9])
    (folder / "README.md").write_text(PROMISE.format(promised))
    message = r"its README\.md says that split train has .* rows; correct num_examples there"
    with pytest.raises(InputError, match=message):
        _ = order_of(folder, 5).stream.promised


def test_an_epoch_without_a_row_is_an_empty_block(tmp_path: Path) -> None:
    """A rank that no row is dealt to."""
    order = order_of(write_numbered(tmp_path / "set", [2]), 5, (2, 3))
    blocks = list(islice(order.blocks(Place()), 2))
    assert blocks[0] == Block(Place(), [])
    assert blocks[1].rows == []
