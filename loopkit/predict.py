"""Prediction: what the step function makes of each batch, in the order of the data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loopkit.compose import eval_step
from loopkit.errors import DataError
from loopkit.evaluate import outputs_of
from loopkit.modes import eval_modes
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def predict(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any],
    *,
    limit_batches: float | None = None,
    inference_mode: bool = True,
) -> Iterator[Any]:
    """Yield what the step function returns for each batch, in the order of the data.

    Modules are in eval mode, without gradients, for the forward alone: the loop's body
    may train between two predictions.

    Args:
        step: An eval step, or a plain function; only its forward runs.
        state: What predicts.
        data: Batches, in order.
        limit_batches: A number of batches, or a fraction of a sized loader.
        inference_mode: `torch.inference_mode`, else `torch.no_grad`.

    Raises:
        DataError: For a loader that shuffles, or empty data.

    Example:
        >>> import torch
        >>> state = TrainState(torch.nn.Linear(1, 1))
        >>> list(predict(lambda state, x: x + 1, state, [torch.zeros(2)]))
        [tensor([1., 1.])]
    """
    if _shuffles(data):
        raise DataError(
            "predict(step, state, loader)",
            "a loader that shuffles, so that predictions would not be in dataset order",
            "DataLoader(dataset, shuffle=False)",
        )

    @contextmanager
    def evaluating() -> Iterator[None]:
        with eval_modes(state), torch.inference_mode() if inference_mode else torch.no_grad():
            yield

    outputs = outputs_of(eval_step(step), state, data, limit_batches, evaluating)
    return (output for _, output in outputs)


def _shuffles(data: Iterable[Any]) -> bool:
    """Whether a loader is known to; its sampler may stand within a batch sampler."""
    if not isinstance(data, DataLoader):
        return False
    samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
    return any(isinstance(sampler, SHUFFLING) for sampler in samplers)
