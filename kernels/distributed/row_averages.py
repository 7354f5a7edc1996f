"""Average the rows of gradient buffers over ranks, bucket by bucket, during the backward pass.

A bucket is neighbouring columns, some 25 MiB of each row.  Buckets go in one order on all ranks,
the last columns first as their gradients are complete first, whatever parameters a rank's own
losses reach: a bucket leaves once it and all before it are complete, the rest when the pass ends.
"""

from collections.abc import Iterator, Sequence

import torch.distributed as dist

from ..gradient_buffer import GradientBuffer
from .rank_group import RankGroup

BUCKET_BYTES = 25 << 20
"""Of a row, as in torch's DistributedDataParallel."""


class _Bucket:
    """Columns of a buffer that are sent together."""

    def __init__(self, buffer: GradientBuffer, columns: slice, members: Sequence[int]) -> None:
        self.buffer, self.columns = buffer, columns
        self.members = frozenset(members)  # numbers of its parameters
        self.waiting: set[int] = set()  # those whose gradients are not complete


class RowAverages:
    """The averages of rows of some gradient buffers over the ranks of a group.

    Parameters are numbered through all buffers, in the order of their slots.

    Args:
        buffers: of the task gradients.
        group: the ranks.
    """

    def __init__(self, buffers: Sequence[GradientBuffer], group: RankGroup) -> None:
        self._group = group
        self._buckets = [bucket for buffer in _divide(buffers) for bucket in buffer]
        self._bucket_of = {number: bucket for bucket in self._buckets for number in bucket.members}
        self._rows = slice(0)
        self._next = len(self._buckets)  # all are sent
        self._works: list[dist.Work] = []

    def start(self, rows: slice) -> None:
        """Begin a backward pass that completes some rows of all buffers."""
        self._rows, self._next = rows, 0
        for bucket in self._buckets:
            bucket.waiting = set(bucket.members)

    def complete(self, number: int) -> None:
        """Note that a parameter's gradients of this pass are in the rows."""
        self._bucket_of[number].waiting.discard(number)
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._send()

    def finish(self) -> None:
        """End the backward pass: send what is not sent yet."""
        while self._next < len(self._buckets):
            self._send()

    def wait(self) -> None:
        """Wait until all rows that were sent are averages; a GPU waits, not its host."""
        with self._group.explaining():
            for work in self._works:
                work.wait()
        self._works.clear()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        for row in bucket.buffer.rows[self._rows, bucket.columns]:
            self._works.append(self._group.start_average(row))


def _divide(buffers: Sequence[GradientBuffer]) -> Iterator[list[_Bucket]]:
    first = 0
    for buffer in buffers:
        yield list(_buckets_of(buffer, first))[::-1]
        first += len(buffer.slots)


def _buckets_of(buffer: GradientBuffer, first: int) -> Iterator[_Bucket]:
    """Yield buckets of at least one parameter each, ascending, without gaps between them."""
    most = BUCKET_BYTES // buffer.rows.element_size()
    begin, members = 0, list[int]()
    for number, slot in enumerate(buffer.slots, first):
        members.append(number)
        if slot.columns.stop - begin >= most:
            yield _Bucket(buffer, slice(begin, slot.columns.stop), members)
            begin, members = slot.columns.stop, []
    if members:
        yield _Bucket(buffer, slice(begin, buffer.slots[-1].columns.stop), members)
