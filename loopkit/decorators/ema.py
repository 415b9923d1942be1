"""Exponential moving averages of the weights."""

import functools
from collections.abc import Callable

import attrs

from loopkit.averages import Averages, averaged_of, check_names, copies_of, move
from loopkit.check import at_least_one, fraction
from loopkit.compose import Decorator, wrap
from loopkit.counting import Count
from loopkit.errors import UsageError
from loopkit.state import TrainState
from loopkit.types import Transform


@attrs.frozen
class UpdateAverages:
    """The layer of `with_ema` with a plain decay: it never waits for the device."""

    inner: Transform
    decay: float
    name: str
    buffers: bool = False

    def __call__(self, state: TrainState) -> None:
        """Move the averages towards the weights, unless the update was skipped."""
        averages = state.features[self.name].weights
        named = averaged_of(state, buffers=self.buffers)
        check_names(f"with_ema(..., name={self.name!r})", named, averages)
        move(state, averages, named, 1 - self.decay)
        self.inner(state)


@attrs.frozen
class UpdateNow:
    """The layer of `with_ema` where the decay depends on the count, or not each update counts."""

    inner: Transform
    decay: float | Callable[[int], float]
    name: str
    buffers: bool
    warmup: float
    every: int

    def __call__(self, state: TrainState) -> None:
        """Count the update if it was applied, and average where it is time."""
        count = state.features[_count_of(self.name)]
        if state.applied:
            count.updates += 1
            if count.updates % self.every == 0:
                self._average(state, count.updates // self.every)
        self.inner(state)

    def _average(self, state: TrainState, n: int) -> None:
        averages = state.features[self.name].weights
        named = averaged_of(state, buffers=self.buffers)
        call = f"with_ema(..., name={self.name!r})"
        check_names(call, named, averages)
        decay = fraction(call, "decay", self.decay(n)) if callable(self.decay) else self.decay
        move(state, averages, named, 1 - min(decay, (1 + n) / (self.warmup + n)))


def _count_of(name: str) -> str:
    return f"{name}.updates"


def _make_averages(state: TrainState, buffers: bool) -> Averages:
    return Averages(copies_of(averaged_of(state, buffers=buffers)))


def _make_count(state: TrainState) -> Count:  # noqa: ARG001
    return Count()


def with_ema(
    decay: float | Callable[[int], float],
    *,
    warmup: float = 1,
    every: int = 1,
    buffers: bool = False,
    name: str = "ema",
) -> Decorator:
    """Keep an exponential moving average of the weights.

    `average <- average + (1 - decay) * (weight - average)` after each applied update,
    from the weights before the first one. Use them with `ema_weights`; they are saved
    with the state, never as the model.

    With `warmup` the n-th average has the decay `min(decay, (1 + n) / (warmup + n))`, so that
    the weights of the beginning are soon forgotten: 10 is usual. Counting (`warmup`,
    `every`, a decay that is a function) waits for the device where a skip was decided on it.

    Args:
        decay: Close to 1: the average looks back about `1 / (1 - decay)` updates. Or a
            function of the number of the average, from 1 on.
        warmup: 1 for none; larger is longer.
        every: Average after each n-th applied update.
        buffers: Average buffers that are not whole numbers, too. Without it they stay the
            model's own: BatchNorm's statistics are averages already.
        name: Where the state keeps them; two averages need two names.

    Raises:
        UsageError: If decay is not between 0 and 1, or the others are below 1.

    Example:
        >>> with_ema(0.999)
        with_ema(0.999)
        >>> with_ema(0.9999, warmup=10, every=8)
        with_ema(0.9999, warmup=10, every=8)

    Source: https://arxiv.org/abs/1907.08610, torch.optim.swa_utils
    """
    given: dict[str, object] = {"warmup": warmup, "every": every, "buffers": buffers, "name": name}
    usual: dict[str, object] = {"warmup": 1, "every": 1, "buffers": False, "name": "ema"}
    parts = [f"{key}={value!r}" for key, value in given.items() if value != usual[key]]
    shown = f"with_ema({', '.join([_shown(decay), *parts])})"
    init = {name: functools.partial(_make_averages, buffers=bool(buffers))}
    share = decay if callable(decay) else fraction(shown, "decay", decay)
    _check_warmup(shown, warmup)
    at_least_one(shown, "every", every)
    if not callable(share) and warmup == 1 and every == 1:
        plain = functools.partial(UpdateAverages, decay=share, name=name, buffers=bool(buffers))
        return wrap(name=shown, init=init, after=plain)
    layer = functools.partial(
        UpdateNow, decay=share, name=name, buffers=bool(buffers), warmup=warmup, every=every
    )
    return wrap(name=shown, init={**init, _count_of(name): _make_count}, after=layer)


def _check_warmup(call: str, warmup: object) -> None:
    if isinstance(warmup, bool) or not isinstance(warmup, int | float) or not warmup >= 1:
        raise UsageError(
            call,
            f"warmup = {warmup!r:.60} ({type(warmup).__name__})",
            "warmup: a number of 1 (none) or more; 10 is usual",
        )


def _shown(decay: object) -> str:
    return getattr(decay, "__name__", None) or f"{decay!r:.60}"
