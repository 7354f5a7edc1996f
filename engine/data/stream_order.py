"""The order of a stream's rows on one rank: blocks in memory, each in a random order.

In each epoch the shards come in a random order.  If they can be divided among the ranks evenly,
each rank has its own, as ``datasets.distributed.split_dataset_by_node`` gives them; otherwise every
rank reads all and keeps one row in R.  A rank reads a few of its shards at once and fills a block
with rows of all of them, and the rows of a block come in a random order.

The orders are functions of (seed, task, epoch, block), so the place of a block decides all that
follows: a run goes on from there without the rows before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..utils.errors import InputError
from ..utils.rng import permutation
from .hub_stream import HubStream
from .rows import Row
from .task_schema import TaskSchema

_LANES = 10
"""Shards that are read at once, at most."""


class Place(NamedTuple):
    """Where a block of a rank begins.

    Attributes:
        epoch: how often the data were gone through before.
        block: the block of that epoch.
        rows: of the epoch that this rank has read.
        lanes: of each of the shards that are read at once, how many came before it in its lane,
            and how many of its rows are read; empty: none is begun.
    """

    epoch: int = 0
    block: int = 0
    rows: int = 0
    lanes: tuple[tuple[int, int], ...] = ()


class Block(NamedTuple):
    """The rows of a block, in a random order.

    Attributes:
        place: where it begins.
        rows: of this rank; none at the end of an epoch that has no further ones.
    """

    place: Place
    rows: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOrder:
    """The order of the rows of one rank.

    Attributes:
        stream: the data.
        schema: of the task.
        size: rows of a block.
        seed: of the run.
        shard: (rank, ranks).
    """

    stream: HubStream
    schema: TaskSchema
    size: int
    seed: int
    shard: tuple[int, int] = (0, 1)

    @property
    def made_from(self) -> tuple[object, ...]:
        """All that decides the order."""
        return (self.stream.digest(), self.schema, self.size, self.seed, self.shard)

    @property
    def where(self) -> str:
        """What error messages call the rows of this rank."""
        rank, ranks = self.shard
        return self.stream.where + (f", for rank {rank} of {ranks}" if ranks > 1 else "")

    @property
    def _deals_shards(self) -> bool:
        return self.stream.num_shards % self.shard[1] == 0

    def shards(self, epoch: int) -> list[int]:
        """Return the numbers of the shards that this rank reads in an epoch, in their order."""
        rank, ranks = self.shard
        names = (self.seed, f"{self.schema.task}/shards", epoch)
        shards: list[int] = permutation(self.stream.num_shards, *names).tolist()
        return shards[rank::ranks] if self._deals_shards else shards

    def blocks(self, place: Place) -> Iterator[Block]:
        """Yield the blocks from a place on, without end; the first of an epoch may be empty.

        Raises:
            InputError: the data cannot be read on, or end early.
        """
        while True:
            yield from self._epoch(place)
            place = Place(place.epoch + 1)

    def _epoch(self, place: Place) -> Iterator[Block]:
        """Yield the blocks of an epoch from a place on."""
        lanes = self._lanes(place)
        while True:
            rows, read = self._fill(lanes, place.rows)
            if not read and place.block:
                self._check_end(place.rows)
                return
            names = (self.seed, f"{self.schema.task}/rank {self.shard[0]}")
            order = permutation(len(rows), *names, place.epoch, place.block)
            yield Block(place, [rows[number] for number in order])
            place = Place(
                place.epoch,
                place.block + 1,
                place.rows + read,
                tuple((lane.begun, lane.row) for lane in lanes),
            )

    def _lanes(self, place: Place) -> list["_Lane"]:
        """Return what reads a few of the rank's shards at once."""
        own = self.shards(place.epoch)
        lanes = min(_LANES, len(own))
        places = place.lanes or ((0, 0),) * lanes
        return [_Lane(self.stream, own[lane::lanes], *places[lane]) for lane in range(lanes)]

    def _fill(self, lanes: list["_Lane"], before: int) -> tuple[list[Row], int]:
        """Return the rank's rows of the next block, and how many were read for it."""
        rank, ranks = (0, 1) if self._deals_shards else self.shard
        rows: list[Row] = []
        read, wanted = 0, self.size * ranks
        while read < wanted:
            at_round = read
            for lane in lanes:
                for table in lane.take(min(-(-wanted // len(lanes)), wanted - read)):
                    own = np.arange((rank - before - read) % ranks, len(table), ranks)
                    rows += self.stream.rows_of(
                        table if ranks == 1 else table.take(own),
                        lane.shard,
                        lane.row - len(table) + own,
                        self.schema,
                        labelled=True,
                    )
                    read += len(table)
            if read == at_round:
                break
        return rows, read

    def _check_end(self, rows: int) -> None:
        """Refuse data that end before the last row that they are said to have."""
        promised = self.stream.promised
        reads_all = self.shard[1] == 1 or not self._deals_shards
        if reads_all and rows < promised:
            raise InputError(
                f"{self.stream.where}: ends behind {rows:,} rows, its README.md says {promised:,}; "
                "see that its files are whole, or correct num_examples there"
            )


class _Lane:
    """Some shards, read one after the other.

    Args:
        stream: that they are of.
        shards: their numbers.
        begun: how many of them are done.
        row: how many rows of the next one are.
    """

    def __init__(self, stream: HubStream, shards: list[int], begun: int, row: int) -> None:
        self._stream, self._shards = stream, shards
        self.begun, self.row = begun, row
        self._tables: Iterator[Any] | None = None
        self._left: Any = None

    @property
    def shard(self) -> int:
        """The number of the shard that is read."""
        return self._shards[self.begun]

    def take(self, count: int) -> Iterator[Any]:
        """Yield the next tables, with so many rows in all, or those that are left."""
        while count > 0 and self.begun < len(self._shards):
            if self._tables is None:
                self._tables = self._stream.tables(self.shard, self.row)
            table = self._left if self._left is not None else next(self._tables, None)
            self._left = None
            if table is None:
                self._tables, self.row = None, 0
                self.begun += 1
                continue
            if len(table) > count:
                self._left, table = table.slice(count), table.slice(0, count)
            self.row += len(table)
            count -= len(table)
            yield table
