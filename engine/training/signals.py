"""Stop requests: SIGINT (Ctrl-C), SIGTERM (a lost machine) and SIGHUP (a closed window)."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_REQUEST = 5.0
"""Seconds within which further SIGTERMs belong to the first.  A scheduler may signal all processes
of a job, and torchrun passes on to its workers what it gets itself."""


class StopRequest:
    """A context manager that is true once a first signal came; a second one acts as usual.

    No step is interrupted: the training loop asks after each step, and writes a checkpoint before
    it ends.  An ignored SIGHUP (``nohup``) stays ignored, and after the first SIGHUP further ones
    are ignored, since a window that closes sends two: from the shell and from the terminal.  A
    SIGTERM within five seconds of the first counts as the same.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came."""
        self._usual: dict[int, signal.Handlers] = {}
        self._since = 0.0

    def __bool__(self) -> bool:
        """Return whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._usual[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the handlers from before."""
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            self._restore()
            if number == signal.SIGHUP:
                signal.signal(number, signal.SIG_IGN)
            elif number == signal.SIGTERM:
                signal.signal(number, self._note)
        elif time.monotonic() - self._since > _SAME_REQUEST:
            signal.signal(number, self._usual[number])
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
