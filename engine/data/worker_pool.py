"""Processes that tokenize pieces of a file, and give them back in order.

Each is started anew and imports what it needs, so that it is small, holds nothing of this process
and does not run the user's own program again, as a copy or ``multiprocessing`` would.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar, cast

from ..utils.errors import InputError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .rows import Piece

T = TypeVar("T")

_AHEAD = 4
"""Pieces a worker that may be done before one that others wait for: bounds the memory."""


class _Failure(NamedTuple):
    """What a worker raised, which was no InputError."""

    report: str


class WorkerPool(Generic[T]):
    """Some workers; use it in a ``with`` statement, which ends them.

    Args:
        preparation: what is done to each piece.
        tokenizer: what to split sentences with.
        count: of processes.
    """

    def __init__(
        self, preparation: "Callable[[Piece, Tokenizer], T]", tokenizer: Tokenizer, count: int
    ) -> None:
        self._workers = dict[Connection, subprocess.Popen[bytes]]()
        for _ in range(count):
            ours, theirs = Pipe()
            with theirs:
                self._workers[ours] = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ
                    | {
                        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                        "TOKENIZERS_PARALLELISM": "false",  # the workers are all that run
                    },
                    stdin=subprocess.DEVNULL,
                )
            ours.send((preparation, tokenizer.to_json(), tokenizer.special_tokens))

    def map(self, pieces: "Iterable[Piece]") -> "Iterator[T]":
        """Yield what is made of each piece, in their order.

        Raises:
            InputError: a row cannot be used (the first in the file), or a process ended.
        """
        numbered = enumerate(_or_error(pieces))
        free, at_work = list(self._workers), dict[Connection, int]()
        done, wanted = dict[int, Any](), 0
        upcoming = next(numbered, None)
        while upcoming is not None or at_work or done:
            while free and upcoming is not None:
                number, piece = upcoming
                if number >= wanted + _AHEAD * len(self._workers):
                    break
                if isinstance(piece, InputError):
                    done[number] = piece
                else:
                    worker = free.pop()
                    self._send(worker, piece)
                    at_work[worker] = number
                upcoming = next(numbered, None)
            if wanted not in done:
                for found in wait(list(at_work)):
                    worker = cast(Connection, found)
                    done[at_work.pop(worker)] = self._receive(worker)
                    free.append(worker)
                continue
            result = done.pop(wanted)
            wanted += 1
            if isinstance(result, InputError):
                raise result
            if isinstance(result, _Failure):
                raise RuntimeError(f"in a process that tokenizes:\n{result.report}")
            yield result

    def _send(self, worker: Connection, piece: "Piece") -> None:
        try:
            worker.send(piece)
        except OSError:
            raise self._ended(worker) from None

    def _receive(self, worker: Connection) -> Any:
        try:
            return worker.recv()
        except (EOFError, OSError):
            raise self._ended(worker) from None

    def _ended(self, worker: Connection) -> InputError:
        status = self._workers[worker].wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return InputError(
            f"a process that tokenizes ended ({how}), for want of memory perhaps; give fewer "
            "--workers"
        )

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the processes."""
        for connection, process in self._workers.items():
            connection.close()
            process.kill()
            process.wait()


def _or_error(pieces: "Iterable[Piece]") -> "Iterator[Piece | InputError]":
    """Yield pieces, and last what is wrong with a file, which counts behind its earlier rows."""
    try:
        yield from pieces
    except InputError as error:
        yield error


def _serve(connection: Connection) -> None:
    """Do what the other side asks, until it closes."""
    try:
        preparation, definition, special_tokens = connection.recv()
        tokenizer = Tokenizer.from_json(definition, special_tokens)
        while True:
            connection.send(_result(preparation, connection.recv(), tokenizer))
    except (EOFError, OSError):
        return


def _result(
    preparation: "Callable[[Piece, Tokenizer], Any]", piece: "Piece", tokenizer: Tokenizer
) -> Any:
    try:
        return preparation(piece, tokenizer)
    except InputError as error:
        return error
    except Exception:
        return _Failure(traceback.format_exc())


if __name__ == "__main__":
    # Signals to a terminal's or a job's processes are for the one that asks.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    _serve(Connection(int(sys.argv[1])))
