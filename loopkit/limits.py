"""The limits of a run: what users write, as numbers."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

import attrs
from torch.utils.data import DataLoader, IterableDataset

from loopkit.check import at_least_one, positive
from loopkit.errors import DataError, UsageError

Time = float | str | datetime.timedelta | Mapping[str, float]
UNITS = ("days", "hours", "minutes", "seconds")


def seconds(time: Time) -> float:
    """A time in seconds: from seconds, a timedelta, "DD:HH:MM:SS", or a dict of units.

    Raises:
        UsageError: If it is none of those, or not above 0.

    Example:
        >>> seconds("00:01:30:00"), seconds({"minutes": 2})
        (5400.0, 120.0)
    """
    try:
        if isinstance(time, str):
            days, hours, minutes, secs = (float(part) for part in time.split(":"))
            value = ((days * 24 + hours) * 60 + minutes) * 60 + secs
        elif isinstance(time, datetime.timedelta):
            value = time.total_seconds()
        elif isinstance(time, Mapping):
            value = datetime.timedelta(**time).total_seconds()
        else:
            value = time
        return positive(f"max_time={time!r}", "max_time", value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"max_time={time!r}",
            "no time above 0",
            f'seconds, a timedelta, "DD:HH:MM:SS", or a dict of {", ".join(UNITS)}',
        ) from error


def known_length(data: Any) -> int | None:
    """Number of batches in `data`; None where that is not known for certain.

    The length of a loader over an IterableDataset is an estimate (torch says so), so it
    is not taken for the truth.

    Example:
        >>> known_length([1, 2]), known_length(iter([1, 2])) is None
        (2, True)
    """
    if isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset):
        return None
    try:
        return len(data)
    except TypeError:
        return None


def is_numbered(data: Any) -> bool:
    """Whether its samples or batches have numbers, so that they can be dealt out by them.

    Example:
        >>> is_numbered([1, 2]), is_numbered(iter([1, 2]))
        (True, False)
    """
    if isinstance(data, DataLoader):
        return not isinstance(data.dataset, IterableDataset)
    numbered = hasattr(data, "__getitem__") and not isinstance(data, Mapping)
    return numbered and known_length(data) is not None


def batch_limit(data: Any, limit: float | None) -> int | None:
    """Batches to take of `data`: all, the first `limit`, or a fraction of them; None if unknown.

    Raises:
        UsageError: For a fraction outside (0, 1], or of data without a length.

    Example:
        >>> batch_limit(range(10), None), batch_limit(range(10), 3), batch_limit(range(10), 0.5)
        (10, 3, 5)
    """
    length = known_length(data)
    if limit is None:
        return length
    if isinstance(limit, float):
        if not 0 < limit <= 1:
            raise UsageError(
                f"limit_batches={limit}",
                f"a fraction of {limit}",
                "a fraction in (0, 1], or an int",
            )
        if length is None:
            raise UsageError(
                f"limit_batches={limit}",
                f"a fraction of data without a length ({type(data).__name__})",
                "a number of batches: limit_batches=100",
            )
        return min(length, max(1, int(round(length * limit, 6))))  # 0.29 * 100 < 29, in floats
    at_least_one(f"limit_batches={limit!r}", "limit_batches", limit)
    return limit if length is None else min(limit, length)


@attrs.frozen
class Limits:
    """Where a run ends, as totals of the state's clock: a resumed run ends where the first would.

    Attributes:
        epochs: Epochs, also fractional; None for no limit.
        steps: Updates.
        seconds: From the start of this run.
        batches: Batches of an epoch, if known.
        capped: Whether `batches` is less than the data may hold.
    """

    epochs: float | None
    steps: int | None
    seconds: float | None
    batches: int | None
    capped: bool

    @classmethod
    def of(
        cls,
        data: Any,
        max_epochs: float | None,
        max_steps: int | None,
        max_time: Time | None,
        limit_batches: float | None,
    ) -> "Limits":
        """Read and check what the user wrote."""
        epochs = (
            None if max_epochs is None else positive(f"{max_epochs=}", "max_epochs", max_epochs)
        )
        steps = None if max_steps is None else at_least_one(f"{max_steps=}", "max_steps", max_steps)
        epochs = None if epochs == math.inf else epochs
        batches = batch_limit(data, limit_batches)
        if batches == 0:
            raise empty(data, "no batches in it: its length is 0")
        if epochs is not None and epochs % 1 and batches is None:
            raise UsageError(
                f"{max_epochs=}",
                f"a fraction of an epoch of data without a length ({type(data).__name__})",
                "max_steps, a whole number of epochs, or limit_batches",
            )
        time = None if max_time is None else seconds(max_time)
        return cls(epochs, steps, time, batches, capped=limit_batches is not None)

    def batches_in(self, epoch: int) -> int | None:
        """Batches to take in an epoch: fewer in the last one of a fractional limit; 0 after it."""
        if self.epochs is None or epoch + 1 <= self.epochs:
            return self.batches
        if self.batches is None or epoch >= self.epochs:
            return 0
        return math.ceil(round((self.epochs - epoch) * self.batches, 6))  # 0.1 * 30 > 3, in floats


def empty(data: Any, found: str) -> DataError:
    """The error for data without a batch."""
    return DataError(
        f"data of type {type(data).__name__}",
        found,
        "data with at least one batch; drop_last=True leaves none of fewer samples than a batch",
    )
