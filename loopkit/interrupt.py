"""Ctrl-C between updates, never within one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruptible:
    """While an update runs, SIGINT waits for its end; a second one does not wait.

    Otherwise an interrupt could fall between two parameters of one optimizer step,
    and leave a state that no training ever had. Outside of updates, and in threads other
    than the main one, interrupts are as always.
    """

    __slots__ = ("_previous", "busy", "pending")

    def __init__(self) -> None:
        self.busy = self.pending = False
        self._previous: Any = None

    def __enter__(self) -> "Interruptible":
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._previous = handler
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.busy = False
        if self._previous is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.busy and not self.pending:
            self.pending = True
        else:
            self._previous(signum, frame)

    def release(self) -> None:
        """Let the interrupt that waited happen now."""
        self.pending = False
        self._previous(signal.SIGINT, None)
