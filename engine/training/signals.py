"""Requests to stop: SIGINT (Ctrl-C), SIGTERM (a lost machine), SIGHUP (a closed window)."""

import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Within its ``with`` block, a first signal only sets it true; a second one acts as usual.

    So a step is never torn: whoever runs the loop looks here after each step, and writes a
    checkpoint before leaving.  SIGHUP that is ignored (``nohup``) stays so, and once it has come
    others of it are: a window that closes sends it twice, from the shell and from the terminal.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came."""
        self._usual: dict[int, signal.Handlers] = {}

    def __bool__(self) -> bool:
        """Return whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Self:
        """Take over the signals."""
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
        """Give the signals back."""
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
