"""Loading in a thread of its own, while the step computes."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from loopkit.check import at_least_one

_END = object()


@attrs.frozen
class Background:
    """An iterable that reads another one ahead, in a thread; made by `background`.

    Attributes:
        data: What is read.
        ahead: Batches that may wait.

    Example:
        >>> len(Background([1, 2, 3], ahead=2))
        3
    """

    data: Iterable[Any]
    ahead: int

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # a TypeError where it has no length

    def __getattr__(self, name: str) -> Any:
        # The first two are not there yet while it is copied; the state of a loader that was read
        # ahead is not where training is, so a position is one in batches that were taken.
        if name in {"data", "ahead", "state_dict", "load_state_dict"}:
            raise AttributeError(name)
        return getattr(self.data, name)  # samplers and set_epoch are asked for by name

    def __iter__(self) -> Iterator[Any]:
        return _read(Reader(self.data, self.ahead))


class Reader:
    """The thread that reads, and the batches that wait.

    Args:
        data: What is read.
        ahead: Batches that may wait.
    """

    def __init__(self, data: Iterable[Any], ahead: int) -> None:
        self._data, self._stopped = data, threading.Event()
        self._waiting: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._read, name="lk.background", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def next(self) -> Any:
        """The next batch, or the mark of the end; raises what reading raised."""
        batch, error = self._waiting.get()
        if error is not None:
            raise error
        return batch

    def stop(self) -> None:
        """Stop reading after the batch that is being read, and wait for that."""
        self._stopped.set()
        while self._thread.is_alive():
            try:  # room for the one that the thread holds, if it holds one
                self._waiting.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _read(self) -> None:
        try:
            batches = iter(self._data)
            try:
                for batch in batches:
                    self._waiting.put((batch, None))
                    if self._stopped.is_set():
                        return
            finally:
                _end(batches)
            self._waiting.put((_END, None))
        except BaseException as error:  # noqa: BLE001  # raised where the batch is asked for
            self._waiting.put((None, error))


def _end(batches: Any) -> None:
    close = getattr(batches, "_shutdown_workers", None) or getattr(batches, "close", None)
    if close is not None:
        close()


def _read(reader: Reader) -> Iterator[Any]:
    reader.start()
    try:
        while (batch := reader.next()) is not _END:
            yield batch
    finally:
        reader.stop()


def background(data: Iterable[Any], *, ahead: int = 2) -> Background:
    """Load the next batches in a thread while the step computes, instead of between steps.

    A loop then takes max(load, step) for each batch where it took load + step, if loading
    waits (disk, network, decoding outside of Python) or the step does (an accelerator, torch's
    own kernels). Workers of a DataLoader do the same with processes; this needs none.

    It is asked for, not the default, because of random numbers: a loader that draws them in this
    process, for its augmentations or its shuffling, draws them earlier and from another thread,
    so a run is repeatable only if it draws them from a generator of its own. What was
    read and not trained on is read again after a restore. An error while loading is raised where
    its batch would have come; leaving the loop ends the thread, and the loader's workers.

    Args:
        data: Any iterable of batches; its length and its sampler stay visible.
        ahead: Batches that may wait in memory, beside the one that is being loaded.

    Raises:
        UsageError: If `ahead` is below 1.

    Example:
        >>> list(background("abc"))
        ['a', 'b', 'c']
    """
    at_least_one(f"background(data, ahead={ahead!r})", "ahead", ahead)
    return Background(data, ahead)
