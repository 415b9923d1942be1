"""Stochastic weight averaging, and BatchNorm's statistics for averaged weights."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from loopkit.averages import Averages, averaged_of, check_names, copies_of, kept_averages, move
from loopkit.check import at_least_one
from loopkit.compose import Decorator, train_step, wrap
from loopkit.counting import Count
from loopkit.device import prefetch
from loopkit.errors import DataError, UsageError
from loopkit.modes import scratch_statistics, untouched_rng
from loopkit.state import TrainState
from loopkit.types import StepFunction, Transform


@attrs.frozen
class AverageEqually:
    """The layer of `with_swa`."""

    inner: Transform
    start: int
    every: int
    name: str

    def __call__(self, state: TrainState) -> None:
        """Count the update if it was applied, and average where it is time."""
        count = state.features[_count_of(self.name)]
        if state.applied:
            count.updates += 1
            passed, rest = divmod(count.updates - self.start, self.every)
            if passed >= 0 and rest == 0:
                self._average(state, passed)
        self.inner(state)

    def _average(self, state: TrainState, n: int) -> None:
        averages, named = state.features[self.name].weights, averaged_of(state)
        if n == 0:
            averages.update(copies_of(named))
            return
        check_names(f"with_swa(..., name={self.name!r})", named, averages)
        # Restored into a state that had none yet they lie where they were read: on the host
        averages.update({name: a.to(named[name].device) for name, a in averages.items()})
        move(state, averages, named, 1 / (n + 1))


def _count_of(name: str) -> str:
    return f"{name}.updates"


def _make_averages(state: TrainState) -> Averages:  # noqa: ARG001
    return Averages({})


def _make_count(state: TrainState) -> Count:  # noqa: ARG001
    return Count()


def with_swa(start: int, *, every: int = 1, name: str = "swa") -> Decorator:
    """Stochastic weight averaging: the plain mean of the weights along the end of training.

    `average = mean(weights after the updates start, start + every, start + 2 * every, ...)`,
    counting applied updates. Use it with `ema_weights(state, "swa")`; before, `update_bn` gives
    it BatchNorm statistics of its own. The learning rate that goes with it is a schedule:
    `cosine(800, peak=0.1) >> constant(200, 0.05)`.

    Args:
        start: The update after which the weights are the first of the mean; of a run,
            `int(0.8 * run(...).total_steps)`.
        every: Updates from one to the next; `len(loader)` for one an epoch.
        name: Where the state keeps them.

    Raises:
        UsageError: If one of them is below 1.

    Example:
        >>> with_swa(start=800, every=10)
        with_swa(start=800, every=10)

    Source: https://arxiv.org/abs/1803.05407, torch.optim.swa_utils
    """
    shown = f"with_swa(start={start!r}, every={every!r}"
    shown += ")" if name == "swa" else f", name={name!r})"
    at_least_one(shown, "start", start)
    layer = functools.partial(
        AverageEqually, start=start, every=at_least_one(shown, "every", every), name=name
    )
    return wrap(name=shown, init={name: _make_averages, _count_of(name): _make_count}, after=layer)


def update_bn(
    step: StepFunction, state: TrainState, data: Iterable[Any], name: str = "swa"
) -> None:
    """Compute the BatchNorm statistics that belong to averaged weights, over the data.

    Running statistics are those of the weights that were trained, not of their average.
    This runs the forward with the averages in place, and keeps the mean of the batches'
    statistics with them: from now on `ema_weights(state, name)` swaps both in. The model
    and the random numbers stay as they were. BatchNorms in eval mode keep their own. With
    several ranks each reads all of the data, and finds the same.

    Args:
        step: What calls the model; only its forward runs, without gradients.
        state: A state trained by a step with `with_swa` or `with_ema`.
        data: Batches of the training data.
        name: The name of the averages.

    Raises:
        UsageError: If there are no averages, or no BatchNorm in train mode.
        DataError: For empty data.

    Example:
        >>> model = torch.nn.BatchNorm1d(2)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = with_swa(start=1)(lambda state, x: state.model(x).square().mean())
        >>> _ = step(state, torch.randn(8, 2))
        >>> update_bn(step, state, [torch.full((8, 2), 3.0)])
        >>> state.features["swa"].statistics["running_mean"]
        tensor([3., 3.])

    Source: https://docs.pytorch.org/docs/stable/optim.html#taking-care-of-batch-normalization
    """
    call = f"lk.update_bn(step, state, data, {name!r})"
    averages, lifted = kept_averages(state, name, call), train_step(step)
    with (
        state.swapped(averages.weights),
        scratch_statistics(state.model) as norms,
        untouched_rng(state.device),
        torch.no_grad(),
    ):
        trained = {prefix: norm for prefix, norm in norms.items() if norm.training}
        _check_norms(call, state, trained)
        with _means_of_batches([*trained.values()]):
            seen = 0
            for seen, batch in enumerate(prefetch(data, state.device), 1):  # noqa: B007
                with lifted.around(state, True):
                    lifted.forward(state, batch)
        if not seen:
            raise DataError(call, "no batch in the data", "batches of the training data")
        for prefix, norm in trained.items():
            for key, buffer in norm.named_buffers(prefix, recurse=False):
                averages.statistics[key] = buffer.clone()
    if name in state.pending:  # restored, and not trained yet
        state.pending[name] = averages.state_dict()


@contextmanager
def _means_of_batches(norms: list[Any]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _check_norms(call: str, state: TrainState, trained: dict[str, Any]) -> None:
    if not trained:
        mode = "train" if state.model.training else "eval"
        raise UsageError(
            call,
            f"no BatchNorm in train mode (the model is in {mode} mode)",
            "model.train() before; without BatchNorm there is nothing to compute",
        )
