"""Feeding a run: an epoch's batches, as the bare batches or the windows that a step takes."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loopkit.data.order import Part
from loopkit.data.watch import DATA_TIMEOUT_S, end_workers, tracing, watch
from loopkit.device import prefetch
from loopkit.errors import DataError
from loopkit.window import Ahead, Window

WindowSizes = Callable[[], int | None]


@contextmanager
def reading(
    data: Iterable[Any], opened: Callable[[Iterable[Any]], Iterator[Any]] = iter
) -> Iterator[Iterator[Any]]:
    """Iterate over `data`, wait for no hung worker, and leave no loader workers behind.

    An iterator of a DataLoader ends its workers when it is collected, but a traceback,
    or a notebook that shows one, keeps it alive: so end them here. An iterator that was
    given as the data is its owner's, and is left as it is.
    """
    loader: Any = data.read if isinstance(data, Part) else data
    with tracing(loader):
        batches = opened(data)
    sources = [batches] if not hasattr(batches, "sources") else batches.sources
    for source in sources:
        watch(source, getattr(loader, "timeout", 0) or DATA_TIMEOUT_S)
    try:
        yield batches
    finally:
        if batches is not data and not getattr(data, "persistent_workers", False):
            _end(batches)
        elif getattr(sources[0], "_shutdown", False):  # a hung one was ended with the others
            vars(loader)["_iterator"] = None


def _end(batches: Any) -> None:
    for source in getattr(batches, "sources", [batches]):
        if hasattr(source, "_shutdown_workers"):
            end_workers(source)
        elif isinstance(source, Generator):  # it may read a loader itself
            source.close()


def counted(batches: Iterator[Any], length: int, *, whole: bool = False) -> Iterator[Any]:
    """Exactly `length` batches; where they are the `whole` data, none may follow.

    Raises:
        DataError: If there are fewer, or more.
    """
    taken = 0
    for taken, batch in enumerate(itertools.islice(batches, length), 1):  # noqa: B007
        yield batch
    if taken < length:
        raise DataError(
            f"data that says len(data) >= {length}",
            f"its end after {taken} batches",
            "data with the true length, or without a length (a generator)",
        )
    if whole:
        check_exhausted(batches, length)


def check_exhausted(batches: Iterator[Any], length: int) -> None:
    """Check that no batch follows the `length` that the data said it had.

    Raises:
        DataError: If one does.
    """
    for _ in batches:
        raise DataError(
            f"data with len(data) = {length}",
            "more batches than that",
            "data with the true length, or limit_batches",
        )


def feed_sized(
    batches: Iterator[Any], length: int, sizes: WindowSizes, device: torch.device
) -> Iterator[Any]:
    """What a step takes, from `length` batches: bare batches, or windows of them.

    Nothing is read before the step asks for it, windows included, so that random
    numbers are drawn in the order of a plain loop.
    """
    moved = prefetch(counted(batches, length), device)
    return moved if sizes() is None else _windows_of(moved, length, sizes)


def _windows_of(moved: Iterator[Any], left: int, sizes: WindowSizes) -> Iterator[Window]:
    while left:
        taken = min(sizes() or 1, left)
        left -= taken
        yield Window(itertools.islice(moved, taken), taken)


def feed_unsized(
    batches: Ahead, left: float, sizes: WindowSizes, device: torch.device
) -> Iterator[Any]:
    """The same from at most `left` batches of data without a length."""
    while left:
        size = sizes()
        chunk = [*itertools.islice(batches, int(min(size or 1, left)))]
        if not chunk:
            return
        if size is not None and type(chunk[0]) is Window:
            raise DataError(
                "run(step, state, lk.windows(data, n))",
                "windows, for a step that accumulates: run makes them itself",
                "run(step, state, data), or for window in lk.windows(data, n): step(state, window)",
            )
        left -= len(chunk)
        moved = prefetch(chunk, device)
        yield next(moved) if size is None else Window(moved, len(chunk))
