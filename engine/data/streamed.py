"""Training examples that are read, checked and tokenized while they are trained on.

A rank's examples are numbered as they come, over all epochs, so that every batch is a range of
them.  Those of a few pieces are in memory.  What is asked for next is read on to; a run that is
resumed begins with the last block before its batch, of which it keeps the places.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ..utils.arrays import Indices
from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_json, read_bytes
from .cache import Reading
from .prepare import Preparation
from .read_ahead import ReadAhead
from .rows import Row
from .split import TokenizedSplit, split_of
from .stream_order import Block, Place, StreamOrder
from .table import check_usable
from .task_batch import TaskBatch
from .tokenized import TEXT_KEYS, Array, Joiner, TokenizedPiece
from .tokenizer import Tokenizer

_PIECE = 256
"""Rows that are tokenized at once."""

_MARKS, _BETWEEN_MARKS = 64, 1000
"""Places of blocks that are kept, and the examples between two of them, at least."""


def _digest(said: Mapping[str, object]) -> str:
    return sha256(dump_json(dict(said), sort_keys=True).encode()).hexdigest()


class StreamSampler:
    """The batches of a stream: of R ranks, rank r's i-th example has the number ``i * R + r``.

    Attributes:
        task: the task's name.
        batch_size: examples in a batch of all ranks.
        batches: how many are an epoch.
    """

    by_rank: ClassVar[bool] = True

    def __init__(self, task: str, batch_size: int, batches: int, ranks: int = 1) -> None:
        """Describe the batches.

        Args:
            task: the task's name.
            batch_size: examples in a batch.
            batches: how many are an epoch, since the data's own end is not known.
            ranks: R.

        Raises:
            InputError: a rank has no place in a batch.
        """
        if batch_size < ranks:
            raise InputError(
                f"batch_size = {batch_size}: too small for {ranks} ranks that each read examples "
                f"of {task}; raise it"
            )
        self.task, self.batch_size, self.batches, self._ranks = task, batch_size, batches, ranks

    def __len__(self) -> int:
        """Return how many examples an epoch has."""
        return self.batch_size * self.batches

    def batch(self, step: int) -> Indices:
        """Return the examples of batch ``step`` (from 0), int64 ``[batch_size]``."""
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for rank in range(self._ranks):
            share = len(range(rank, self.batch_size, self._ranks))
            own = np.arange(step * share, (step + 1) * share)
            chosen[rank :: self._ranks] = own * self._ranks + rank
        return chosen


class _Chunk(NamedTuple):
    """Some rows of a block.

    Attributes:
        rows: theirs.
        place: of the block; None where it is not the block's first chunk.
    """

    rows: Sequence[Row]
    place: Place | None


def _chunks(blocks: Iterable[Block]) -> Iterator[_Chunk]:
    """Yield the rows of blocks in chunks."""
    for block in blocks:
        for first in range(0, max(1, len(block.rows)), _PIECE):
            yield _Chunk(block.rows[first : first + _PIECE], None if first else block.place)


class StreamedExamples:
    """The training examples of a task, from a stream, on one rank.

    Args:
        order: of the rows.
        preparation: what is done to them.
        tokenizer: what to split sentences with.
        reading: shows how far rows are passed over.
        all_pieces: as of :class:`~.split.TokenizedSplit`.
        folder: of the run, where the places of blocks were kept.

    Attributes:
        task: the task's name.
        bad_rows: rows that were skipped, by reason, among those that were not passed over.
        first_bad: what was wrong with the first of these.
        truncated: sentences that were cut to the limit on the length, likewise.
        notes: what is to be known of the stream, a line each.

    Raises:
        InputError: it cannot be read, or has no row that this rank can use.
    """

    def __init__(
        self,
        order: StreamOrder,
        preparation: Preparation,
        tokenizer: Tokenizer,
        reading: Reading,
        *,
        all_pieces: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.task = order.schema.task
        self.bad_rows, self.first_bad, self.truncated = Counter[str](), "", 0
        self.notes = [
            f"streamed, shuffled in a buffer of {order.size:,} rows; another number of ranks sees "
            "other batches"
        ]
        self._order, self._preparation, self._tokenizer = order, preparation, tokenizer
        self._reading, self._all_pieces = reading, all_pieces
        said = (*order.made_from, preparation, tokenizer.definition)
        self._made_from = sha256(repr(said).encode()).hexdigest()
        order.stream.check(order.schema, labelled=True)
        self._marks = [(0, Place())] if folder is None else self._kept_marks(folder)
        self._pieces = deque[TokenizedPiece]()
        self._joined: TokenizedSplit | None = None
        self._start = self._end = 0
        self._step = -1  # that the last batch was of
        self._usable, self._is_whole = 0, False  # of the epoch, and whether it was seen begin
        self._bad_of_epoch, self._first_bad = Counter[str](), ""
        self._barren = set[int]()  # shards of the epochs since one had a row to use
        self._blocks: ReadAhead[Block] | None = None
        self._begin(0, Place())
        self._read_to(0, 1)

    def __len__(self) -> int:
        """Return how many rows the data set says that it has; 0 where it does not say."""
        return self._order.stream.promised

    def task_batch(self, chosen: Indices, step: int, /) -> TaskBatch:
        """Return the chosen examples of this rank; nothing about them is random."""
        split, places = self._found(chosen, step)
        return split.task_batch(places, step)

    def sequence_sizes(self, chosen: Indices, step: int, /) -> Indices:
        """Return the tokens of all first sequences of chosen examples, then of all second ones."""
        split, places = self._found(chosen, step)
        return split.sequence_sizes(places, step)

    def terms(self, chosen: Indices, /) -> int:
        """Return how many terms the mean loss of chosen examples, of any ranks, has."""
        if self._order.schema.labels != "words":
            return len(chosen)
        split, places = self._found(chosen, self._step)
        return split.terms(places)

    def go_to(self, batch: Indices) -> None:
        """Read on to a batch, and show how many rows are passed over."""
        if not len(batch):
            return
        first = int(batch[self._order.shard[0]]) // self._order.shard[1]
        with self._reading.watch(self._order.stream.name) as show:
            begun = self._seek(first)
            while self._end <= first:
                self._read_chunk(first)
                show(self._end - begun, min(1.0, (self._end - begun) / max(1, first - begun)))

    def keep_marks(self, folder: Path) -> None:
        """Write the places of the last blocks into the run's folder.

        They are what a resumed run begins with; without them it reads all again.

        Raises:
            InputError: the system refuses it.
        """
        marks = [[index, *place] for index, place in list(self._marks)]
        said = {"made_from": self._made_from, "marks": marks}
        write_text(self._file(folder), dump_json(said | {"sha256": _digest(said)}))

    def _file(self, folder: Path) -> Path:
        return folder / f"stream-{self.task}-rank-{self._order.shard[0]}.json"

    def _kept_marks(self, folder: Path) -> list[tuple[int, Place]]:
        """Return the places that are kept in a run's folder, if they are of this stream.

        Raises:
            InputError: the file is damaged.
        """
        first, path = [(0, Place())], self._file(folder)
        if not path.exists():
            return first
        try:
            said = parse_json(read_bytes(path))
            if said.pop("sha256") != _digest(said):
                raise ValueError("of another content")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}: damaged; remove it, and the stream is read from its beginning"
            ) from error
        if said["made_from"] != self._made_from:
            return first
        return [
            (index, Place(epoch, block, rows, tuple((begun, row) for begun, row in lanes)))
            for index, epoch, block, rows, lanes in said["marks"]
        ]

    def _found(self, chosen: Indices, step: int) -> tuple[TokenizedSplit, Indices]:
        """Return the examples in memory, and the places of chosen ones among them."""
        rank, ranks = self._order.shard
        own, others = np.divmod(chosen, ranks)
        assert not (others - rank).any(), f"{self.task}: examples of another rank"
        first, stop = int(own.min()), int(own.max()) + 1
        if step != self._step:  # further micro-batches of a step come behind the first
            self._step = step
            self._drop_before(first)
        self._seek(first)
        self._read_to(first, stop)
        if self._joined is None:
            self._joined = self._join()
        return self._joined, own - self._start

    def _seek(self, first: int) -> int:
        """Begin with the last known block before an example, where that saves reading.

        Returns:
            The example that reading goes on from.
        """
        index, place = max((mark for mark in self._marks if mark[0] <= first), default=(0, Place()))
        if first < self._start or index > self._end:
            self._begin(index, place)
        return self._end

    def _begin(self, index: int, place: Place) -> None:
        """Begin with a block, whose first example has a number."""
        self._pieces.clear()
        self.bad_rows.clear()
        self.first_bad = ""
        self.truncated = 0
        self._joined, self._step = None, -1
        self._start = self._end = index
        if self._blocks is not None:
            self._blocks.close()  # two threads would read the same files
        self._blocks = ReadAhead(self._order.blocks(place))
        self._chunks = _chunks(self._blocks)
        self._is_whole = False
        self._barren.clear()

    def _read_to(self, first: int, stop: int) -> None:
        """Read until examples ``first`` to ``stop`` are in memory, and those between."""
        while self._end < stop:
            self._read_chunk(first)

    def _read_chunk(self, first: int) -> None:
        """Read some rows on; their examples are kept unless all come before ``first``."""
        chunk = next(self._chunks)
        if chunk.place is not None:
            self._begin_block(chunk.place)
        table = self._preparation.table(chunk.rows)
        self._usable += len(table)
        self._bad_of_epoch.update(table.bad_rows)
        self._first_bad = self._first_bad or table.first_bad
        if self._end + len(table) <= first and self._order.schema.labels != "spans":
            self._drop_before(first)
            self._start = self._end = self._end + len(table)
            return
        piece = self._preparation.tokenized(table, self._tokenizer)
        self.bad_rows.update(table.bad_rows)
        self.first_bad = self.first_bad or table.first_bad
        self.truncated += piece.truncated
        self._pieces.append(piece)
        self._end += piece.examples
        self._joined = None
        self._drop_before(first)

    def _begin_block(self, place: Place) -> None:
        """Take note of where a block begins.

        Raises:
            InputError: it is the first of an epoch, and no shard had a row to use.
        """
        if place.block == 0:
            if self._is_whole:
                self._end_epoch(place.epoch - 1)
            self._usable, self._is_whole = 0, True
        # Those behind this one are of a phase or a run that went further.
        before = [mark for mark in self._marks if mark[0] <= self._end]
        if self._end >= (before[-1][0] if before else 0) + _BETWEEN_MARKS:
            self._marks = [*before[-_MARKS:], (self._end, place)]

    def _end_epoch(self, epoch: int) -> None:
        """Refuse data without a row to use, once all shards were looked through.

        A rank may be dealt such shards in one epoch, and others in the next.

        Raises:
            InputError: there is none.
        """
        self._barren = set() if self._usable else self._barren | {*self._order.shards(epoch)}
        if len(self._barren) == self._order.stream.num_shards:
            check_usable(0, self._order.where, self._bad_of_epoch, self._first_bad)
        if not self._barren:
            self._bad_of_epoch, self._first_bad = Counter[str](), ""

    def _drop_before(self, first: int) -> None:
        """Forget the pieces whose examples all come before one."""
        while self._pieces and self._start + self._pieces[0].examples <= first:
            self._start += self._pieces.popleft().examples
            self._joined = None

    def _join(self) -> TokenizedSplit:
        """Return the pieces in memory as one split."""
        arrays: dict[str, list[Array]] = {}
        joiner = Joiner(lambda name, rows: arrays.setdefault(name, []).append(rows))
        for piece in self._pieces:
            joiner.add(piece)
        joined = {name: np.concatenate(rows) for name, rows in arrays.items()}
        keys = joined.pop(TEXT_KEYS, None)
        split = split_of(self.task, joiner.totals(), joined, ())
        ids = None
        if keys is not None:
            # Numbers by the texts alone, the same on all ranks; below 0 stands for no text.
            ids = (keys[:, 0] >> np.uint64(1)).astype(np.int64).reshape(-1, split.columns)
        return replace(split, text_ids=ids, all_pieces=self._all_pieces)
