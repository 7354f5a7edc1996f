"""Tokenize a file piece by piece, in several processes where it is large."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from ..utils.cpus import usable_cpus
from .rows import Piece, Row
from .table import OnBadRow, Table, table_of
from .task_schema import TaskSchema
from .tokenized import TokenizedPiece, tokenize_table
from .tokenizer import Tokenizer
from .worker_pool import WorkerPool, or_error

T = TypeVar("T")

_HERE = 8
"""Pieces that are tokenized in this process before others are started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What is done to each piece of a file.

    Attributes:
        schema: of the task.
        labelled: whether the labels are read.
        on_bad_row: what to do with a row that cannot be used.
        max_length: the most tokens in a sentence.
        joins_pairs: whether the two sentences of an example make one sequence.
    """

    schema: TaskSchema
    labelled: bool
    on_bad_row: OnBadRow
    max_length: int
    joins_pairs: bool

    def __call__(self, piece: Piece, tokenizer: Tokenizer) -> TokenizedPiece:
        """Return a piece's examples."""
        return self.tokenized(self.table(piece.rows, piece.first_row), tokenizer)

    def table(self, rows: Iterable[Row], first_row: int = 0) -> Table:
        """Return rows that are checked, as of :func:`~.table.table_of`."""
        return table_of(
            rows, first_row, self.schema, labelled=self.labelled, on_bad_row=self.on_bad_row
        )

    def tokenized(self, table: Table, tokenizer: Tokenizer) -> TokenizedPiece:
        """Return the examples of rows that were checked."""
        return tokenize_table(
            self.schema, table, tokenizer, self.max_length, joins_pairs=self.joins_pairs
        )


def prepared(
    pieces: Iterable[Piece],
    preparation: Callable[[Piece, Tokenizer], T],
    tokenizer: Tokenizer,
    workers: int = 0,
) -> Iterator[T]:
    """Yield what is made of each piece, in their order, whatever the number of workers.

    Args:
        pieces: of a file.
        preparation: what is done to each, in any process.
        tokenizer: what to split sentences with.
        workers: processes; 0 for as many as there are cores.

    Raises:
        InputError: a row cannot be used, or a worker ends.
    """
    pieces, workers = iter(pieces), workers or usable_cpus()
    few = pieces if workers == 1 else islice(pieces, _HERE)
    for piece in few:
        yield preparation(piece, tokenizer)
    found = or_error(pieces)
    # No more processes than there are pieces.
    if further := list(islice(found, workers)):
        with WorkerPool(preparation, tokenizer, len(further)) as pool:
            yield from pool.map(chain(further, found))
