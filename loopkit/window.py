"""Windows: the micro-batches of one update."""

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import attrs

from loopkit.errors import DataError, UsageError


def _length_of(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Collection) else None


@attrs.frozen
class Window:
    """The micro-batches of one update; what a step with `with_grad_accum` takes.

    It may be lazy: any iterable will do. Where its length is known beforehand the
    mean over the micro-batches is folded into each loss, as one writes by hand;
    where it is not, the gradients are divided once at the end.

    Args:
        batches: The micro-batches.
        length: How many there are; by default `len(batches)`, or None when that
            is not known before they were read.

    Raises:
        UsageError: For a length below 1.

    Example:
        >>> Window([1, 2, 3]).length
        3
        >>> Window(iter([1, 2, 3])).length is None
        True
    """

    batches: Iterable[Any]
    length: int | None = attrs.field(
        default=attrs.Factory(lambda self: _length_of(self.batches), takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise UsageError(
                f"Window(batches, length={self.length})",
                f"{self.length} micro-batches",
                "a window of at least one micro-batch; skip the update where there is none",
            )

    def marked(self) -> Iterator[tuple[Any, bool]]:
        """Each micro-batch with a flag that is true at the last one.

        A window of unknown length is read one micro-batch ahead, to know its last.

        Raises:
            DataError: If the window holds none, or not as many as its length says.
        """
        return _marked_to(self) if self.length is not None else _marked_ahead(self)


def _marked_to(window: Window) -> Iterator[tuple[Any, bool]]:
    seen = 0
    for batch in window.batches:
        seen += 1
        yield batch, seen == window.length
    if seen != window.length:
        raise DataError(
            f"Window(batches, length={window.length})",
            f"{seen} micro-batches in it; a window can be read once if its batches can",
            "the true length, or none at all for a window that is read to its end",
        )


def _marked_ahead(window: Window) -> Iterator[tuple[Any, bool]]:
    batches = iter(window.batches)
    end = object()
    batch = next(batches, end)
    if batch is end:
        raise DataError(
            "Window(batches)",
            "no micro-batch in it",
            "a window of at least one; an iterator that was read before is empty",
        )
    while batch is not end:
        following = next(batches, end)
        yield batch, following is end
        batch = following


def windows(data: Iterable[Any], n: int) -> Iterator[Window]:
    """Cut `data` into windows of `n` micro-batches; the last one may be shorter.

    For loops driven by hand; `run` makes its windows itself. No window is empty,
    and nothing is left over for the next epoch.

    Args:
        data: Any iterable of batches.
        n: Micro-batches of one update, at least 1.

    Raises:
        UsageError: For `n` below 1.

    Example:
        >>> [list(w.batches) for w in windows("abcde", 2)]
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    if n < 1:
        raise UsageError(f"windows(data, {n})", f"n = {n}", "windows(data, n) with n >= 1")
    batches = iter(data)
    return (Window(chunk) for chunk in iter(lambda: list(itertools.islice(batches, n)), []))
