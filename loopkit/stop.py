"""Stopping early, when a score says so."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
from loguru import logger

from loopkit.check import NO_SCORE, at_least_one, near, one_of
from loopkit.errors import UsageError
from loopkit.ranks import is_main_rank


def _monitor(stop: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    if not isinstance(value, str):
        raise UsageError(
            f"EarlyStopping({value!r:.40})",
            f"a {type(value).__name__} as the monitor",
            'the name of a score that evaluate returns: EarlyStopping("loss")',
        )


def _mode(stop: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    one_of(f"EarlyStopping(mode={value!r})", "mode", value, ("min", "max"))


def _patience(stop: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    at_least_one(f"EarlyStopping(patience={value!r})", "patience", value)


def _number(stop: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    optional, call = attribute.default is None, f"EarlyStopping({attribute.name}={value!r})"
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise UsageError(call, f"a {type(value).__name__}", f"{attribute.name}: a number")
    if not optional and value < 0:
        raise UsageError(call, f"{value}, below 0", "how much a score must be better by: 0 or more")


@attrs.define
class EarlyStopping:
    """Says after each evaluation whether to stop: `if stop(scores): break`.

    A score is better if it beats the best so far by more than `min_delta`; `patience`
    evaluations in a row that are not better stop. So does a score that reaches
    `stopping_threshold`, one beyond `divergence_threshold`, and one that is not finite.
    Why is in `reason`, and logged. Given to the state as an extra,
    `TrainState(model, optimizer, stop=stop)`, it is saved and restored with the rest.
    On several ranks the scores of `evaluate` are equal, and so is the answer.

    Args:
        monitor: Name of the score.
        mode: `"min"` or `"max"`: whether a low or a high score is good.
        patience: Evaluations without a better score, at least 1.
        min_delta: How much more than the best so far a score has to be better by.
        stopping_threshold: A score better than this is good enough.
        divergence_threshold: A score worse than this is hopeless.
        check_finite: Stop at NaN and infinity; otherwise NaN is a score that is not better.

    Attributes:
        best: The best score so far; None before the first.
        waited: Evaluations since then.
        reason: Why it said stop last; None if it did not.

    Raises:
        UsageError: For settings that cannot be right, and for scores without the monitor.

    Example:
        >>> stop = EarlyStopping("accuracy", mode="max", patience=2)
        >>> [stop({"accuracy": score}) for score in (0.5, 0.8, 0.7, 0.8)]
        [False, False, False, True]
        >>> stop.reason
        'accuracy has not risen above 0.8 in 2 evaluations'

    Source: Prechelt, "Early Stopping - But When?", 1998
    """

    monitor: str = attrs.field(validator=_monitor)
    mode: str = attrs.field(default="min", kw_only=True, validator=_mode)
    patience: int = attrs.field(default=3, kw_only=True, validator=_patience)
    min_delta: float = attrs.field(default=0.0, kw_only=True, validator=_number)
    stopping_threshold: float | None = attrs.field(default=None, kw_only=True, validator=_number)
    divergence_threshold: float | None = attrs.field(default=None, kw_only=True, validator=_number)
    check_finite: bool = attrs.field(default=True, kw_only=True)
    best: float | None = attrs.field(default=None, init=False)
    waited: int = attrs.field(default=0, init=False)
    reason: str | None = attrs.field(default=None, init=False)

    def __call__(self, scores: Mapping[str, float]) -> bool:
        """Whether to stop, after an evaluation that gave these scores."""
        if not isinstance(scores, Mapping):
            raise UsageError(
                f"EarlyStopping({self.monitor!r}) called with {scores!r:.40}",
                f"a {type(scores).__name__} as the scores",
                f'what evaluate returns, or a name for it: stop({{"{self.monitor}": score}})',
            )
        if self.monitor not in scores:
            raise UsageError(
                f"EarlyStopping({self.monitor!r}) called with scores",
                f"no {self.monitor!r} in {sorted(scores)}",
                f"EarlyStopping of {near(self.monitor, scores)}{NO_SCORE}",
            )
        self.reason = self._judge(float(scores[self.monitor]))
        if self.reason is not None and is_main_rank():  # all ranks say it
            logger.info("stop: {}", self.reason)
        return self.reason is not None

    def _judge(self, score: float) -> str | None:
        """Take the score in, and say why to stop."""
        if self.check_finite and not math.isfinite(score):
            return f"{self.monitor} is {score}"
        if self._is_better(score, self.stopping_threshold):
            return f"{self.monitor} has reached {score:g}, beyond {self.stopping_threshold:g}"
        if self._is_worse(score, self.divergence_threshold):
            return f"{self.monitor} has got to {score:g}, worse than {self.divergence_threshold:g}"
        worst = math.inf if self.mode == "min" else -math.inf
        if self._is_better(score, worst if self.best is None else self.best, self.min_delta):
            self.best, self.waited = score, 0
            return None
        self.waited += 1
        return self._impatience() if self.waited >= self.patience else None

    def _impatience(self) -> str:
        many = f"{self.waited} evaluation{'s' * (self.waited > 1)}"
        if self.best is None:
            return f"{self.monitor} has not been a finite number in {many}"
        move = "fallen below" if self.mode == "min" else "risen above"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"{self.monitor} has not {move} {self.best:g}{by} in {many}"

    def _is_better(self, score: float, other: float | None, by: float = 0.0) -> bool:
        if other is None:
            return False
        return score + by < other if self.mode == "min" else score - by > other

    def _is_worse(self, score: float, other: float | None) -> bool:
        if other is None:
            return False
        return score > other if self.mode == "min" else score < other

    def state_dict(self) -> dict[str, Any]:
        """The best score, how long ago it was, and why it said stop."""
        return {"best": self.best, "waited": self.waited, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]
        self.reason = state_dict["reason"]
