"""Signals between updates, never within one."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

SAME_S = 1.0  # a launcher and a terminal both send one signal, twice within milliseconds
CHILD = getattr(signal, "SIGCHLD", None)


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
        noted = isinstance(getattr(handler, "__self__", None), Notice)  # nothing to wait for
        if callable(handler) and not noted and in_main_thread():
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
        if installed and self.previous is not None and in_main_thread():
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


def in_main_thread() -> bool:
    """Where alone Python lets handlers be set."""
    return threading.current_thread() is threading.main_thread()


def _before(ended: Interruptible) -> Any:
    """The handler from before; not that of another run, begun before, which has ended as well."""
    other = getattr(ended.previous, "__self__", None)
    return _before(other) if isinstance(other, Interruptible) and other.ended else ended.previous


class Notice:
    """Signals as a request that is read later: a handler sets `signum`, and does no more.

    A second signal, later than a second after the first, does what it would have done
    without this. So does the second in a forked process, such as a data worker: the first,
    which is often sent to all processes of a job, must not end it before its parent. From the
    first one on, the end of a child is no error: torch's handler for SIGCHLD would raise one
    in the midst of an update, as its workers die of a SIGTERM that is not their parent's.
    Ignored signals stay ignored.

    Args:
        signals: Their numbers.

    Attributes:
        signum: The first that came, or 0.
        hurried: Whether a second one came.
    """

    __slots__ = ("at", "hurried", "previous", "process", "signals", "signum")

    def __init__(self, signals: Iterable[int]) -> None:
        self.signals, self.signum, self.hurried = tuple(signals), 0, False
        self.at, self.process = 0.0, os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Notice":
        for signum in self.signals:
            handler = signal.getsignal(signum)
            if handler not in (None, signal.SIG_IGN):
                self.previous[signum] = handler
                signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for signum, handler in self.previous.items():
            own = _passed_over if signum == CHILD else self._handle
            if signal.getsignal(signum) == own and in_main_thread():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self.at = signum, time.monotonic()
            if CHILD is not None and signal.getsignal(CHILD) is not None:
                self.previous[CHILD] = signal.signal(CHILD, _passed_over)
        elif os.getpid() != self.process or time.monotonic() - self.at > SAME_S:
            self.hurried = True
            self._pass_on(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        handler = self.previous[signum]
        signal.signal(signum, handler)
        if callable(handler):
            handler(signum, frame)
        else:  # the system's: the process ends here
            os.kill(os.getpid(), signum)


def _passed_over(signum: int, frame: FrameType | None) -> None:
    """The handler for ends of children; with none, one that is under way would be complained of."""
