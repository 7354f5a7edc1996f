"""Weight gradients on a side stream, beside the rest of the backward pass.

Nothing in a backward pass reads a weight gradient, so a GPU can compute it while the chain of input
gradients goes on.  An operator that writes gradient rows and nothing else is registered as one
(``only_rows`` of :func:`~kernels.registration.backend.register_cuda`); its launch is handed to the
queue that is open for the gradient buffer of its rows (:func:`queued`), where there is one.

Until the current stream waits for a launch,

- its operands keep their memory, since the queue holds them.  What the launch allocates is memory
  of the side stream, and goes to later launches there.
- its operands keep their values.  Autograd adds in place only to a tensor that nobody else holds;
  torch.compile overwrites what it does not need any more unless :data:`UNCHANGED_OPERANDS` tell it
  not to.
- its rows are not read, and not written but by the launches behind it.  Every other operator of
  this package waits where it is given columns of them (:func:`join_for`, by ``register_cuda``): so
  does the one that adds an embedding's gradients to a table which is a decoder's weight, too.
  Autograd itself adds to the columns of parameters that belong to one task, which no operator
  writes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

UNCHANGED_OPERANDS: dict[str, Any] = {"allow_buffer_reuse": False, "inplace_buffers": False}
"""Options of Inductor: it writes no result into the memory of another tensor."""

Launch = Callable[[], object]


class GradientQueue(Protocol):
    """Interface of :class:`SideStream`."""

    @property
    def operands(self) -> Iterable[Tensor]:
        """What the launches read and write that the current stream does not wait for yet."""

    def submit(self, launch: Launch, operands: tuple[Tensor, ...]) -> None:
        """Run ``launch`` behind those before it, and hold its operands until it is waited for."""

    def join(self) -> None:
        """Let the current stream wait for all launches."""


class SideStream:
    """A stream that branches off the current one; a CUDA graph of the one holds both.

    The current stream must be the same from the first launch to the join.

    Args:
        device: where the launches run.
        most: launches that the current stream does not wait for, which bounds the memory of their
            operands.  Eight are two layers of a BERT: enough that it hardly ever has to wait, few
            beside the activations of all layers.
    """

    def __init__(self, device: torch.device, most: int = 8) -> None:
        self._stream, self._most = torch.cuda.Stream(device), most
        self._held: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    @property
    def operands(self) -> Iterable[Tensor]:
        """What the launches read and write that the current stream does not wait for yet."""
        return [tensor for _, operands in self._held for tensor in operands]

    def submit(self, launch: Launch, operands: tuple[Tensor, ...]) -> None:
        """Launch behind all that the current stream has been given so far."""
        current, done = torch.cuda.current_stream(self._stream.device), torch.cuda.Event()
        self._held.append((done, operands))  # a launch that raises is to be joined, too
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            launch()
        done.record(self._stream)
        if len(self._held) > self._most:
            oldest, operands = self._held.popleft()
            current.wait_event(oldest)  # then the operands' memory may be written again

    def join(self) -> None:
        """Let the current stream wait for all launches; a recording must not end before."""
        held, self._held = self._held, deque()
        if held:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class _Open(NamedTuple):
    """A gradient buffer ``[K, P]`` and the queue of launches that write into it."""

    buffer: Tensor
    queue: GradientQueue

    def awaits(self, rows: Tensor) -> bool:
        """Return whether launches that nobody waits for yet have columns of ``rows``."""
        own, memory = self._columns(rows), self.buffer.untyped_storage().data_ptr()
        others = [x for x in self.queue.operands if x.untyped_storage().data_ptr() == memory]
        columns = map(self._columns, others)
        return any(own.start < other.stop and other.start < own.stop for other in columns)

    def _columns(self, rows: Tensor) -> range:
        """Return a range of columns that holds all of a tensor's elements in the buffer."""
        width = self.buffer.stride(0)
        steps = zip(rows.shape, rows.stride(), strict=True)
        first = rows.storage_offset() % width
        last = first + sum((size - 1) * stride for size, stride in steps if stride % width)
        return range(first, last + 1) if last < width else range(width)


# By the memory of the buffer, not by thread: a backward pass on a GPU runs in a thread of its own.
_open: dict[int, _Open] = {}


@contextmanager
def queued(buffer: Tensor, queue: GradientQueue | None) -> Iterator[None]:
    """Queue the weight gradients that are written into a buffer; join at the end, always.

    Args:
        buffer: the gradient buffer ``[K, P]``.
        queue: None to launch at once.
    """
    if queue is None:
        yield
        return
    memory = buffer.untyped_storage().data_ptr()
    _open[memory] = _Open(buffer, queue)
    try:
        yield
    finally:
        del _open[memory]
        queue.join()


def enqueue(launch: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Call ``launch(*arguments)``, or hand it to the queue that is open for one of the tensors.

    Args:
        launch: writes gradient rows, and nothing else.
        arguments: of the launch, tensors and others.
    """
    _, opened = next(_opened(arguments), (None, None))
    if opened is None:
        launch(*arguments)
    else:
        operands = tuple(x for x in arguments if isinstance(x, Tensor))
        opened.queue.submit(partial(launch, *arguments), operands)


def join_for(arguments: tuple[Any, ...]) -> None:
    """Wait for what is queued for the gradient rows among an operator's arguments."""
    for rows, opened in _opened(arguments):
        if opened.awaits(rows):
            opened.queue.join()


def _opened(arguments: tuple[Any, ...]) -> Iterator[tuple[Tensor, _Open]]:
    """Yield the tensors that lie in a buffer for which a queue is open."""
    if not _open:
        return
    for x in arguments:
        if isinstance(x, Tensor) and (opened := _open.get(x.untyped_storage().data_ptr())):
            yield x, opened
