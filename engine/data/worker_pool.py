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

_PROGRAM = f"from {__name__} import serve; serve()"

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
        self._told = (preparation, *tokenizer.definition)
        self._new = set[Connection]()
        """Those that do not know yet what is to be done, since they may be starting still."""
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        try:
            ours, theirs = Pipe()
            with theirs:
                self._workers[ours] = subprocess.Popen(
                    # Of what is imported nothing comes from elsewhere than in this process.
                    [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ
                    | {
                        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                        "TOKENIZERS_PARALLELISM": "false",  # the workers are all that run
                    },
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the one that asks
                )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(
                f"cannot start a process that tokenizes: {reason}; give fewer --workers"
            ) from error
        self._new.add(ours)

    def map(self, pieces: "Iterable[Piece | InputError]") -> "Iterator[T]":
        """Yield what is made of each piece, in their order.

        Args:
            pieces: of a file, up to an error of it (:func:`or_error`).

        Raises:
            InputError: a row cannot be used (the first in the file), or a process ended.
        """
        numbered = enumerate(or_error(pieces))
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
            if worker in self._new:
                worker.send(self._told)
                self._new.remove(worker)
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
        self._end()

    def _end(self) -> None:
        for connection, process in self._workers.items():
            connection.close()
            process.kill()
            process.wait()


def or_error(pieces: "Iterable[Piece | InputError]") -> "Iterator[Piece | InputError]":
    """Yield pieces, and last what is wrong with a file, which counts behind its earlier rows."""
    try:
        yield from pieces
    except InputError as error:
        yield error


def serve() -> None:
    """Do what the other side asks, until it closes; the number of its socket is the argument."""
    # Signals to a job's processes are for the one that asks.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
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
    except MemoryError:
        return InputError("a process that tokenizes is out of memory; give fewer --workers")
    except Exception:
        return _Failure(traceback.format_exc())
