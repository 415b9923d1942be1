"""The learning rate range test."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from loopkit.check import at_least_one, positive
from loopkit.compose import wrap
from loopkit.debug.fork import beside, fork, loss_of, on_the_side
from loopkit.errors import DataError, UsageError
from loopkit.extras import extra
from loopkit.run import run
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction, Update
from loopkit.window import MicroBatches

DIVERGED = 4.0  # times the lowest smoothed loss: Smith's test is over there
MEMORY = 0.9  # of the running mean that says when it is over
WIDTH = 1 / 50  # of the range: how far neighbours count for the smoothed curve


@attrs.frozen
class LrCurve:
    """The loss over learning rates, each of one update; it prints as text.

    Attributes:
        lrs: The learning rates.
        losses: The loss before the update with each.
        smoothed: A mean of each and its neighbours, which neither lags nor leads.
        suggestion: Where the smoothed loss falls fastest over log(lr); None if it does not fall.
        diverged: Whether the loss rose again: to twice its lowest, or until the test was over.

    Example:
        >>> curve = LrCurve((0.1, 0.2), (1.0, 0.5), (1.0, 0.5), 0.1, False)
        >>> print(str(curve).splitlines()[-1].strip())
        suggestion (steepest slope): lr=1.0e-01
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    def __str__(self) -> str:
        lowest = min(self.smoothed)
        at = self.lrs[self.smoothed.index(lowest)]
        text = (
            f"{len(self.lrs)} learning rates from {self.lrs[0]:.1e} to {self.lrs[-1]:.1e}:"
            f" the loss goes from {self.smoothed[0]:.4g} to {lowest:.4g} at {at:.1e}"
        )
        text += ", then diverges" if self.diverged else ", and has not diverged"
        if self.suggestion is None:
            return text + "; it falls nowhere, so there is nothing to suggest"
        return text + f"\nsuggestion (steepest slope): lr={self.suggestion:.1e}"

    def plot(self, path: str | Path) -> Path:
        """Draw the curve with the suggestion to an image file (`.png`, `.svg`, `.pdf`).

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        # Not pyplot: that would choose a backend for the whole process.
        module = extra("matplotlib.figure", package="matplotlib", wrote=f"curve.plot({path!r})")
        figure = module.Figure(figsize=(8, 4.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.lrs, self.losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
        axis.plot(self.lrs, self.smoothed, color="tab:blue", linewidth=2, label="smoothed")
        if self.suggestion is not None:
            self._mark(axis, self.suggestion)
        low = min(self.losses)
        room = max(max(self.losses[: len(self.losses) // 4 + 1]) - low, 1e-12)
        axis.set_ylim(low - 0.1 * room, low + 1.5 * room)  # what diverges leaves the picture
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axis.set_title("learning rate range test", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
        figure.savefig(path, dpi=150)
        return Path(path)

    def _mark(self, axis: Any, lr: float) -> None:
        loss = self.smoothed[self.lrs.index(lr)]
        axis.axvline(lr, color="tab:red", linewidth=1, linestyle="--")
        axis.plot([lr], [loss], "o", color="tab:red", label=f"suggestion: {lr:.1e}")


@attrs.frozen
class SetRate:
    """The innermost layer of `update`, after any schedule's: the learning rate of the test."""

    inner: Update
    lrs: tuple[float, ...]
    first: int
    ratios: tuple[float, ...]

    def __call__(self, state: TrainState, window: MicroBatches) -> bool | Tensor:
        """Set it in every group, in the groups' own ratios."""
        assert state.optimizer is not None
        lr = self.lrs[state.step - self.first]
        for group, ratio in zip(state.optimizer.param_groups, self.ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
        return self.inner(state, window)


def find_lr(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any],
    *,
    start: float = 1e-7,
    end: float = 10.0,
    n: int = 100,
) -> LrCurve:
    """Find a learning rate: train a copy while it grows from `start` to `end`, and watch the loss.

    `lr_i = start * (end / start)**(i / (n - 1))`, over the step's own schedule; groups keep the
    ratios of their rates. It ends where the loss is not finite, or four times its lowest. The
    suggestion is where the smoothed loss falls fastest over log(lr), before it has fallen by half
    and rises again. The state, the random numbers and the order of the data are left as they were.

    Args:
        step: What trains.
        state: What would be trained.
        data: What on; iterable anew, and more than once if it is shorter than `n` updates.
        start: The lowest rate.
        end: The highest.
        n: Updates, at least 10.

    Raises:
        UsageError: If `start` is not below `end`, or `n` too small.
        DataError: If there is no data, it is an iterator, or the first loss is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = [torch.ones(4, 2)] * 100
        >>> curve = find_lr(lambda s, x: (s.model(x) - 3).square().mean(), state, data)
        >>> 1e-3 < curve.suggestion < 0.33, curve.diverged, state.step
        (True, True, 0)

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks",
        https://arxiv.org/abs/1506.01186
    """
    call = f"lk.find_lr(..., start={start!r}, end={end!r}, n={n!r})"
    lrs = _rates(call, start, end, n)
    losses: list[float] = []
    means: list[float] = []
    with on_the_side(call, state, data):
        lifted, branch = fork(step, state)
        rates = [float(group["lr"]) for group in branch.optimizer.param_groups]  # type: ignore[union-attr]
        ratios = tuple(rate / rates[0] if rates[0] else 1.0 for rate in rates)
        layer = functools.partial(SetRate, lrs=lrs, first=branch.step, ratios=ratios)
        trial = wrap(name="find_lr", update=layer)(lifted)
        for branch in run(trial, branch, beside(data), max_steps=branch.step + n):
            if not math.isfinite(loss := loss_of(branch)):
                break
            losses.append(loss)
            means.append(_running_mean(losses))
            if means[-1] > DIVERGED * min(means) > 0:
                break
    if not losses:
        raise DataError(
            call, f"a first loss of {loss}", "a step whose loss is finite before it is trained"
        )
    return _curve(lrs, losses, over=len(losses) < n)


def _rates(call: str, start: float, end: float, n: int) -> tuple[float, ...]:
    if positive(call, "start", start) >= positive(call, "end", end) or end == math.inf:
        raise UsageError(call, f"start = {start} and end = {end}", "start below end, both finite")
    if at_least_one(call, "n", n) < 10:
        raise UsageError(call, f"n = {n}, too few to see a slope", "n: 10 or more, such as 100")
    return tuple(start * (end / start) ** (i / (n - 1)) for i in range(n))


def _running_mean(losses: list[float]) -> float:
    """The running mean at the last loss, without a bias towards the start."""
    weights = [MEMORY**age for age in range(len(losses))]
    return _mean(weights, losses[::-1])


def _mean(weights: list[float], losses: list[float]) -> float:
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def _smooth(losses: list[float], width: float) -> list[float]:
    """A Gaussian mean of each loss and its neighbours; a running mean would move slopes up."""
    places = range(len(losses))
    near = [[math.exp(-0.5 * ((i - j) / width) ** 2) for j in places] for i in places]
    return [_mean(weights, losses) for weights in near]


def _foot(smoothed: list[float], lowest: int) -> int:
    """Where the great fall ends: it has fallen by half of it all, and rises for the first time.

    What comes after, down to the lowest, may be the leaps of rates that are too large.
    """
    half = (smoothed[0] + smoothed[lowest]) / 2
    for i in range(lowest):
        if smoothed[i] <= half and smoothed[i + 1] > smoothed[i]:
            return i
    return lowest


def _curve(lrs: tuple[float, ...], losses: list[float], *, over: bool) -> LrCurve:
    smoothed = _smooth(losses, max(1.0, WIDTH * len(lrs)))
    lowest = smoothed.index(min(smoothed))
    slopes = [smoothed[i + 1] - smoothed[i - 1] for i in range(1, _foot(smoothed, lowest))]
    steepest = min(range(len(slopes)), key=slopes.__getitem__, default=None)
    falls = steepest is not None and slopes[steepest] < 0
    suggestion = lrs[1 + steepest] if steepest is not None and falls else None
    diverged = over or smoothed[-1] > 2 * smoothed[lowest]
    return LrCurve(lrs[: len(losses)], tuple(losses), tuple(smoothed), suggestion, diverged)
