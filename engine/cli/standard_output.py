"""Keep commands running when standard output or standard error fails.

The reader may close them (``| head -1``, a closed window), or the disk of a log may be full.  The
command still does its work, and its exit status tells:

    training            continues without output, and ends with the status of the training
    other commands      write their files; 141 (as SIGPIPE) without a reader, else one line and 2
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO, cast

_NO_READER = (errno.EPIPE, errno.ECONNRESET)
_CANNOT_WRITE = 2
_BY_SIGNAL = 128


class Output:
    """A text stream whose writes never fail; what cannot be written is dropped, for good.

    Args:
        stream: where text goes, as long as it can.

    Attributes:
        failure: the first error of a write, or None.
        needed: whether the command is done only if all was written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._was_terminal = stream, stream.isatty()
        self.failure: OSError | None = None
        self.needed = True
        if hasattr(stream, "reconfigure"):  # characters that an encoding lacks are no reason to end
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is waiting, or drop it."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        """Return whatever else the stream has."""
        return getattr(self._stream, name)

    @property
    def reason(self) -> str:
        """Why it failed, in words; empty where it did not, or where nobody reads any more."""
        if self.failure is None or self.has_no_reader:
            return ""
        return (self.failure.strerror or str(self.failure)).lower()

    @property
    def has_no_reader(self) -> bool:
        """Whether the other end of the pipe, or the terminal, is gone."""
        number = None if self.failure is None else self.failure.errno
        return number in _NO_READER or (number == errno.EIO and self._was_terminal)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            first, self.failure = self.failure is None, self.failure or error
            self._drop_the_rest()
            if first and not self.needed and self.reason:
                print(f"cannot write to stdout: {self.reason}; going on without", file=sys.stderr)

    def _drop_the_rest(self) -> None:
        """Redirect the stream to the null device: Python would flush its buffer again at exit."""
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):  # not a file
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        self._stream.flush()


def train_without_output() -> None:
    """Declare that the process trains: lost output does not change its exit status any more."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):
            stream.needed = False


def guard_output() -> None:
    """Let the standard streams of a process that trains for another one never fail a write."""
    out, err = (Output(stream) for stream in _opened(sys.stdout, sys.stderr))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    train_without_output()


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and exit with its status, or with one that tells of its output.

    Args:
        main: returns the exit status; None is 0.
    """
    usual = sys.stdout, sys.stderr
    out, err = (Output(stream) for stream in _opened(*usual))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        try:
            status = main() or 0
        except SystemExit as leaving:  # --help, say
            if isinstance(leaving.code, int | None):
                status = leaving.code or 0
            else:  # as Python does
                status = 1
                print(leaving.code, file=err)
        out.flush()
        if status == 0 and out.needed and out.failure is not None:
            if out.reason:
                print(
                    f"error: cannot write to stdout: {out.reason}; make room or send it elsewhere "
                    "(files are written all the same)",
                    file=err,
                )
            status = _BY_SIGNAL + signal.SIGPIPE if out.has_no_reader else _CANNOT_WRITE
        err.flush()
    finally:
        sys.stdout, sys.stderr = usual
    sys.exit(status)


def _opened(*streams: TextIO | None) -> Iterable[TextIO]:
    """Open those of the standard streams that the process was started without (``>&-``)."""
    if None in streams:
        # Else the next file that is opened gets such a number, and what libraries print.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    return [open(os.devnull, "w") if stream is None else stream for stream in streams]
