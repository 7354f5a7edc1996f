"""Stop requests: SIGINT (Ctrl-C), SIGTERM (a lost machine) and SIGHUP (a closed window)."""

import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """A context manager that is true once a first signal came; a second one acts as usual.

    No step is interrupted: the training loop asks after each step, and writes a checkpoint before
    it ends.  An ignored SIGHUP (``nohup``) stays ignored, and after the first SIGHUP further ones
    are ignored, since a window that closes sends two: from the shell and from the terminal.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came."""
        self._usual: dict[int, signal.Handlers] = {}

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
        self.signal = signal.Signals(number)
        self._restore()
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
