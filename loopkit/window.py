"""Windows: the micro-batches of one update."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import attrs

from loopkit.errors import UsageError


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

    def micro_batches(self) -> "MicroBatches":
        """The micro-batches and their number, as the `gradients` of a step take them.

        A window of unknown length is read one micro-batch ahead, to know its last.
        """
        if self.length is None:
            return Ahead(iter(self.batches)), None
        return self.batches, self.length


MicroBatches = tuple[Iterable[Any], int | None]
"""What a call of a step computes on: micro-batches, and how many if that is known."""


@attrs.frozen
class KeepMicroBatches:
    """A layer of `split` that holds a window's micro-batches, so that they can be read again.

    For what computes an update's gradients more than once: `wrap(split=KeepMicroBatches)`.

    Example:
        >>> layer = KeepMicroBatches(lambda state, batch: (iter(batch), 2))
        >>> layer(None, ["a", "b"])
        (['a', 'b'], 2)
    """

    inner: Callable[[Any, Any], MicroBatches]

    def __call__(self, state: Any, batch: Any) -> MicroBatches:
        """Micro-batches that can be read more than once."""
        micro_batches, _ = self.inner(state, batch)
        kept = [*micro_batches]
        return kept, len(kept)


class Ahead:
    """An iterator that knows whether it has given its last item; asked, it reads one ahead.

    Attributes:
        items: What it reads from.

    Example:
        >>> items = Ahead(iter("ab"))
        >>> [(item, items.at_end) for item in items]
        [('a', False), ('b', True)]
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items
        self._read: list[Any] = []

    @property
    def at_end(self) -> bool:
        """Whether nothing follows."""
        if not self._read:
            self._read.extend(itertools.islice(self.items, 1))
        return not self._read

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        return self._read.pop() if self._read else next(self.items)


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
    if isinstance(n, Mapping) or callable(n):
        raise UsageError(
            f"windows(data, {n!r:.60})",
            f"n as a {type(n).__name__}, by a clock that it does not know",
            "the n of this epoch, windows(data, 1 if state.epoch < 4 else 8), called anew for each;"
            " or lk.run(step, state, data), which follows with_grad_accum({0: 1, 4: 8}) by itself",
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(
            f"windows(data, {n!r})", f"n = {n!r}", "windows(data, n) with a whole n >= 1"
        )
    batches = iter(data)
    return (Window(chunk) for chunk in iter(lambda: list(itertools.islice(batches, n)), []))
