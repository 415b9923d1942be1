"""How often to save: every so many updates, so much time, or at the end of each epoch."""

import datetime
import re
import time

import attrs

from loopkit.check import at_least_one
from loopkit.errors import UsageError
from loopkit.state import TrainState

UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
Interval = int | str | datetime.timedelta


@attrs.define
class Every:
    """Says after each update whether it is time to save.

    Attributes:
        steps: Updates between saves, or None.
        seconds: Time between saves, or None; neither means the ends of epochs.
    """

    steps: int | None = None
    seconds: float | None = None
    _since: float = attrs.field(factory=time.monotonic)

    @classmethod
    def of(cls, every: Interval) -> "Every":
        """Read what the user wrote.

        Raises:
            UsageError: If it is no interval.

        Example:
            >>> Every.of("10min").seconds, Every.of(500).steps, Every.of("epoch").steps
            (600.0, 500, None)
        """
        if every == "epoch":
            return cls()
        if isinstance(every, str | datetime.timedelta):
            return cls(seconds=_seconds(every))
        return cls(steps=at_least_one(f"Checkpointer(dir, every={every!r})", "every", every))

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after this update."""
        if self.steps is not None:
            return state.step % self.steps == 0  # the same ones after a resume
        if self.seconds is None:
            return state.epoch_end
        now = time.monotonic()
        due = bool(state.ranks.agree(now - self._since >= self.seconds))
        self._since = now if due else self._since
        return due


def _seconds(every: str | datetime.timedelta) -> float:
    if isinstance(every, datetime.timedelta):
        value = every.total_seconds()
    else:
        match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", every)
        value = float(match[1]) * UNITS[match[2]] if match else 0.0
    if value <= 0:
        raise UsageError(
            f"Checkpointer(dir, every={every!r})",
            "no interval above 0",
            'a number of updates (500), a time ("30s", "10min", "2h"), or "epoch"',
        )
    return value
