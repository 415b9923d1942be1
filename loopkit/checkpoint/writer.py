"""Writing in the background, one save at a time."""

import concurrent.futures.thread  # noqa: F401  # its end is registered before ours, see below
import threading
import weakref
from collections.abc import Callable

# At exit Python ends all executors before it waits for threads, and a store's library that
# needs one (to look up a host) would fail in the midst of the last save. What is registered
# here comes first. Without it (it is not public) such a save fails, and says so.
_before_executors_end = getattr(threading, "_register_atexit", lambda *_: None)


class Writer:
    """Runs one job at a time in a thread of its own; what goes wrong waits to be asked for.

    The thread is no daemon: a process that ends, in whatever way Python notices, waits for
    it. An error that nobody asked for by then is shown at the end.

    Example:
        >>> writer, done = Writer(), []
        >>> writer.start(lambda: done.append(1)); writer.join(); writer.error(), done
        (None, [1])
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []
        weakref.finalize(self, _show, self._errors)
        _before_executors_end(_join, weakref.ref(self))

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], object]) -> None:
        """Run a job, after the one that is running."""
        self.join()
        errors = self._errors
        self._thread = threading.Thread(target=_run, args=(job, errors), name="loopkit-save")
        self._thread.start()

    def join(self) -> None:
        """Wait for the job that is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def error(self) -> BaseException | None:
        """The error of an earlier job; told once."""
        return self._errors.pop() if self._errors else None


def _join(writer: "weakref.ref[Writer]") -> None:
    if (found := writer()) is not None:
        found.join()


def _run(job: Callable[[], object], errors: list[BaseException]) -> None:
    try:
        job()
    except BaseException as error:  # noqa: BLE001  # told where the loop can hear it
        errors.append(error)


def _show(errors: list[BaseException]) -> None:
    if errors:
        error = errors.pop()
        raise error
