"""A split of a data set by name that is read from its files, without a copy on the disk.

The library opens its shards, files as a rule, one by one.  Its own shuffle buffer is not used: the
buffer's rows are lost when the state of a stream is loaded, so that a resumed run would miss them.
What is drawn instead is a function of the seed: :mod:`.stream_order`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..utils.errors import InputError, first_line
from .hf_datasets import Stream, check_columns, open_stream, spelling
from .rows import Row, Rows, as_pieces, find_columns, typed_row
from .table import OnBadRow, Table, collect
from .task_schema import TaskSchema

_ROWS = 1000
"""Rows that are read at once."""


@dataclass(frozen=True)
class HubStream:
    """A split of a data set that the library ``datasets`` reads, from the hub or a folder."""

    name: str
    subset: str
    split: str

    @property
    def where(self) -> str:
        """What error messages call it."""
        return f"data set {self.name}, split {self.split}"

    @property
    def num_shards(self) -> int:
        """How many shards it can be divided into: files, as a rule."""
        return len(self._stream.shards)

    @property
    def promised(self) -> int:
        """How many rows its README.md says that it has; 0 where it does not say."""
        return self._stream.promised

    def digest(self, *, verify: bool = False) -> str:  # noqa: ARG002 -- its files are not read
        """Return a hash of the names of its files, and of their times or their commit."""
        return self._stream.digest

    def check_unchanged(self) -> None:
        """Refuse a split whose files changed since it was opened.

        Raises:
            InputError: they did.
        """
        if open_stream(self.name, self.subset, self.split).digest != self.digest():
            raise InputError(
                f"changed while it was read, {self.where}; start again when it is done"
            )

    def check(self, format_: TaskSchema, *, labelled: bool) -> None:
        """Refuse a split that lacks columns, or has other things than text and numbers in them.

        Raises:
            InputError: it does, or has no row.
        """
        features, columns = self._stream.features, format_.columns(labelled=labelled)
        if features is None:
            raise InputError(f"no usable row, {self.where}; give a data set that has some")
        find_columns(list(features), columns, self.where)
        lists, objects = format_.list_columns, format_.object_columns
        check_columns(features, columns, self.where, lists, objects)

    @contextmanager
    def rows(self, format_: TaskSchema, *, labelled: bool) -> Iterator[Rows]:
        """Open the rows, each a record of the data set, in the order of its files."""
        self.check(format_, labelled=labelled)

        def rows() -> Iterator[Row]:
            for shard in range(self.num_shards):
                first = 0
                for table in self.tables(shard):
                    numbers = range(first, first + len(table))
                    yield from self.rows_of(table, shard, numbers, format_, labelled=labelled)
                    first += len(table)

        yield Rows(as_pieces(rows()), [])

    def table(self, format_: TaskSchema, *, labelled: bool, on_bad_row: OnBadRow) -> Table:
        """Return the examples: :func:`~.table.collect`."""
        with self.rows(format_, labelled=labelled) as rows:
            return collect(rows, self.where, format_, labelled=labelled, on_bad_row=on_bad_row)

    def rows_of(
        self,
        table: Any,
        shard: int,
        numbers: Iterable[int],
        format_: TaskSchema,
        *,
        labelled: bool,
    ) -> Iterator[Row]:
        """Yield the rows of a table.

        Args:
            table: of a shard, a ``pyarrow.Table``.
            shard: its number.
            numbers: of the rows in the shard.
            format_: the schema of the task.
            labelled: whether the label is among the columns.
        """
        columns, spelled = format_.columns(labelled=labelled), self._spelling(format_)
        lists, objects = format_.list_columns, format_.object_columns
        place = f"{self.where}, {self._stream.shards[shard]}, row"
        known = [name for name in columns if name in table.column_names]
        for number, record in zip(numbers, table.select(known).to_pylist(), strict=True):
            if format_.label in record:
                record[format_.label] = spelled(record[format_.label])
            yield typed_row(record, columns, f"{place} {number}", lists, objects)

    def tables(self, shard: int, first: int = 0) -> Iterator[Any]:
        """Yield the tables of a shard, each a ``pyarrow.Table`` of a few rows.

        Args:
            shard: its number.
            first: the row to begin with.

        Raises:
            InputError: it cannot be read on.
        """
        row = 0
        with self._explained(shard, row):
            part = self._stream.data.shard(num_shards=self.num_shards, index=shard)
            tables = iter(part.iter(_ROWS))
        while True:
            with self._explained(shard, row):
                table = next(tables, None)
            if table is None:
                return
            skipped, row = min(max(first - row, 0), len(table)), row + len(table)
            if skipped < len(table):
                yield table.slice(skipped)

    @contextmanager
    def _explained(self, shard: int, row: int) -> Iterator[None]:
        """Turn what the library raises into one line."""
        try:
            yield
        except Exception as error:
            raise InputError(
                f"{self.where}, {self._stream.shards[shard]}: cannot be read on behind row {row} "
                f"({first_line(error)}); see that it is whole and can be reached"
            ) from error

    def _spelling(self, format_: TaskSchema) -> Any:
        return spelling(self._stream.features, format_)

    @cached_property
    def _stream(self) -> Stream:
        return open_stream(self.name, self.subset, self.split)
