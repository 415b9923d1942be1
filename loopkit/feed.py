"""Feeding a run: an epoch's batches, as the bare batches or the windows that a step takes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loopkit.device import prefetch
from loopkit.errors import DataError
from loopkit.window import Window

_END = object()

WindowSizes = Callable[[], int | None]


@contextmanager
def reading(data: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over `data`, and leave no loader workers behind.

    An iterator of a DataLoader ends its workers when it is collected, but a traceback,
    or a notebook that shows one, keeps it alive: so end them here.
    """
    batches = iter(data)
    try:
        yield batches
    finally:
        end_workers = getattr(batches, "_shutdown_workers", None)
        if end_workers is not None and not getattr(data, "persistent_workers", False):
            end_workers()


def counted(batches: Iterator[Any], length: int) -> Iterator[Any]:
    """Exactly `length` batches.

    Raises:
        DataError: If there are fewer.
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


def feed_sized(
    batches: Iterator[Any], length: int, sizes: WindowSizes, device: torch.device
) -> Iterator[tuple[Any, bool]]:
    """What a step takes, from `length` batches, each with a flag that is true at the last.

    Nothing is read before the step asks for it, windows included, so that random
    numbers are drawn in the order of a plain loop.
    """
    moved, left = prefetch(counted(batches, length), device), length
    if sizes() is None:
        for index, batch in enumerate(moved, 1):
            yield batch, index == length
        return
    while left:
        taken = min(sizes() or 1, left)
        left -= taken
        yield Window(itertools.islice(moved, taken), taken), not left


def feed_unsized(
    batches: Iterator[Any], sizes: WindowSizes, device: torch.device
) -> Iterator[tuple[Any, bool]]:
    """The same from data without a length, which is read one batch ahead to know the last."""
    ahead = next(batches, _END)
    while ahead is not _END:
        size = sizes()
        chunk = [ahead, *itertools.islice(batches, (size or 1) - 1)]
        ahead = next(batches, _END)
        moved = prefetch(chunk, device)
        yield next(moved) if size is None else Window(moved, len(chunk)), ahead is _END
