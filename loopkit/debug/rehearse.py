"""Rehearsals: a few batches through everything, and a few batches over and over."""

import copy
import itertools
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import attrs
import torch

from loopkit.check import at_least_one
from loopkit.debug.fork import beside, fork, on_the_side
from loopkit.errors import UsageError
from loopkit.evaluate import evaluate
from loopkit.feed import reading
from loopkit.limits import batch_limit, empty
from loopkit.rng import rng_state, set_rng_state
from loopkit.run import Run, run
from loopkit.state import TrainState
from loopkit.step import Step, name_of_function
from loopkit.types import StepFunction
from loopkit.updates import Updates

Data = Iterable[Any] | Mapping[str, Iterable[Any]]


@attrs.frozen
class Rehearsal:
    """What a few batches gave; it prints as text.

    Attributes:
        step: Name of the step function.
        updates: The metrics of each update.
        samples: Samples of each update.
        scores: What the evaluation gave; None without one.

    Example:
        >>> print(Rehearsal("train_step", ({"loss": 0.5},), (32,), None))
        train_step: 1 update
          update 1   32 samples  loss 0.5
          the state is as it was; nothing was saved or logged
    """

    step: str
    updates: tuple[Mapping[str, float], ...]
    samples: tuple[int, ...]
    scores: Mapping[str, float] | None

    def __str__(self) -> str:
        lines = [f"{self.step}: {len(self.updates)} update{'s' * (len(self.updates) > 1)}"]
        for number, (found, samples) in enumerate(zip(self.updates, self.samples, strict=True), 1):
            lines.append(f"  update {number:<3} {samples} samples  {_words(found)}")
        if self.scores is not None:
            lines.append(f"  evaluated   {_words(self.scores)}")
        return "\n".join([*lines, "  the state is as it was; nothing was saved or logged"])


def _words(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def fast_dev_run(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any],
    eval_step: Step | StepFunction | None = None,
    eval_data: Data | None = None,
    metrics: Any = None,
    *,
    n: int = 1,
) -> Rehearsal:
    """Put a few batches through training and evaluation, to see that all of it works.

    It runs on a copy: the state, the random numbers and the order of the data stay as they
    were, and no checkpoint or log is written. So it can stand before the real loop for good.

    Args:
        step: What trains.
        state: What would be trained.
        data: What it would be trained on; iterable anew.
        eval_step: What evaluates; by default nothing is evaluated.
        eval_data: What on, as for `evaluate`.
        metrics: As for `evaluate`.
        n: Updates, and batches to evaluate.

    Raises:
        UsageError: If `n` is not 1 or more, or one of `eval_step`, `eval_data` is missing.
        DataError: If there is no data, or it is an iterator, which would lose batches.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = lambda state, x: (state.model(x) * 0).mean() + 1
        >>> print(fast_dev_run(step, state, [torch.ones(4, 2)], step, [torch.ones(3, 2)]))
        <lambda>: 1 update
          update 1   4 samples  loss 1  lr 0.1
          evaluated   loss 1
          the state is as it was; nothing was saved or logged
        >>> state.step
        0
    """
    call = f"lk.fast_dev_run(..., n={n!r})"
    at_least_one(call, "n", n)
    if (eval_step is None) != (eval_data is None):
        raise UsageError(
            "lk.fast_dev_run(...)",
            "an eval_step without eval_data, or the other way round",
            "both, or none: lk.fast_dev_run(step, state, loader, eval_step, val_loader)",
        )
    with on_the_side(call, state, data, *_loaders(eval_data)):
        lifted, branch = fork(step, state)
        updates, samples = [], []
        for branch in run(lifted, branch, beside(data), max_steps=branch.step + n):
            updates.append({name: float(value) for name, value in branch.metrics.items()})
            samples.append(branch.outcome.samples)
        scores = None
        if eval_step is not None and eval_data is not None:
            measures, few = copy.deepcopy(metrics), beside(eval_data)
            scores = evaluate(eval_step, branch, few, measures, limit_batches=n)
    return Rehearsal(name_of_function(lifted), tuple(updates), tuple(samples), scores)


def _loaders(data: Data | None) -> list[Any]:
    return [*data.values()] if isinstance(data, Mapping) else [data]


def sanity_check(
    step: Step | StepFunction, state: TrainState, data: Data, n: int = 2, *, metrics: Any = None
) -> dict[str, float]:
    """Evaluate a few batches before training, so that a mistake there shows now, not hours later.

    Parameters, modes, random numbers, the order of shuffling, a stateful loader's position
    and the metrics are left as they were; the training that follows is bit for bit the same.

    Args:
        step: An eval step.
        state: What is evaluated.
        data: Batches, or several named, as for `evaluate`; iterable anew.
        n: Batches.
        metrics: As for `evaluate`.

    Returns:
        The scores, over these few batches.

    Raises:
        UsageError: If `n` is not 1 or more.
        DataError: If there is no data, or it is an iterator, which would lose batches.

    Example:
        >>> state = TrainState(torch.nn.Linear(1, 1))
        >>> sanity_check(lambda state, x: x.mean(), state, [torch.ones(2)] * 10)
        {'loss': 1.0}
    """
    call = f"lk.sanity_check(..., n={n!r})"
    at_least_one(call, "n", n)
    with on_the_side(call, state, *_loaders(data)):
        return evaluate(step, state, beside(data), copy.deepcopy(metrics), limit_batches=n)


class Overfit(Updates):
    """The states of a copy that is trained on a few batches; made by `overfit`.

    Attributes:
        run: What trains it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        super().__init__(_beside(run, run.state.device))

    @property
    def total_steps(self) -> int | None:
        """That of the run."""
        return self.run.total_steps

    @property
    def state(self) -> TrainState:
        """The copy."""
        return self.run.state

    def close(self) -> None:
        """End it where it is, the run as well."""
        super().close()
        self.run.close()


def _beside(run: Run, device: torch.device) -> Generator[TrainState]:
    """The states of a run that has random numbers of its own, beside those of the caller."""
    own = rng_state(device)
    while True:
        callers = rng_state(device)
        set_rng_state(own, device)
        try:
            state = next(run, None)
        finally:
            own = rng_state(device)
            set_rng_state(callers, device)
        if state is None:
            return
        yield state


def overfit(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any],
    batches: float = 1,
    *,
    max_steps: int = 100,
) -> Overfit:
    """Train a copy on the same few batches over and over: a model that can learn learns them.

    The first batches are read once and kept. If the loss on them does not go down to
    almost nothing there is a mistake in the model, the loss or the data. The states that it
    yields are the copy's: yours, the random numbers and the order of the data stay.

    Args:
        step: What trains.
        state: What is copied.
        data: What the batches are taken from; iterable anew.
        batches: How many: a number, or a fraction of a sized loader.
        max_steps: Updates of the copy.

    Returns:
        An iterator of states, as of `run`: break when you like.

    Raises:
        UsageError: For a fraction outside (0, 1], or numbers below 1.
        DataError: If there is no data, or it is an iterator, which would lose batches.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> x = torch.ones(4, 2)
        >>> for trial in overfit(lambda s, x: (s.model(x) - 3).square().mean(), state, [x] * 9):
        ...     pass
        >>> bool(trial.loss < 1e-6), state.step
        (True, 0)

    Source: https://karpathy.github.io/2019/04/25/recipe/
    """
    call = f"lk.overfit(..., batches={batches!r}, max_steps={max_steps!r})"
    at_least_one(call, "max_steps", max_steps)
    with on_the_side(call, state, data):
        few = first_batches(call, beside(data), batches)
        lifted, branch = fork(step, state)
    return Overfit(run(lifted, branch, few, max_steps=branch.step + max_steps))


def first_batches(call: str, data: Iterable[Any], batches: float) -> list[Any]:
    """The first batches of the data, a number or a fraction of them, in a list.

    Raises:
        UsageError: For a fraction outside (0, 1], or of data without a length.
    """
    try:
        limit = batch_limit(data, batches)
    except UsageError as error:
        raise UsageError(call, error.found, error.instead.replace("limit_", "")) from error
    with reading(data) as opened:
        found = [*itertools.islice(opened, limit)]
    if not found:
        raise empty(data, "no batch in it")
    return found
