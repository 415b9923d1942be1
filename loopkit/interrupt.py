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

    __slots__ = ("busy", "ended", "pending", "previous")

    def __init__(self) -> None:
        self.busy = self.pending = self.ended = False
        self.previous: Any = None

    def __enter__(self) -> "Interruptible":
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and _in_main_thread():
            self.previous = handler
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.busy, self.ended = False, True
        installed = signal.getsignal(signal.SIGINT) == self._handle
        if installed and self.previous is not None and _in_main_thread():
            signal.signal(signal.SIGINT, _before(self))
        if self.pending and isinstance(error, Exception):
            self.release()  # it waited for an update that failed: it must not be lost

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.busy and not self.pending:
            self.pending = True
        else:
            self.previous(signum, frame)

    def release(self) -> None:
        """Let the interrupt that waited happen now."""
        self.pending = False
        self.previous(signal.SIGINT, None)


def _in_main_thread() -> bool:
    """Where alone Python lets handlers be set."""
    return threading.current_thread() is threading.main_thread()


def _before(ended: Interruptible) -> Any:
    """The handler from before; not that of another run, begun before, which has ended as well."""
    other = getattr(ended.previous, "__self__", None)
    return _before(other) if isinstance(other, Interruptible) and other.ended else ended.previous
