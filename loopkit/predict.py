"""Prediction: what the step function makes of each batch, in the order of the data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loopkit.compose import eval_step
from loopkit.device import to_device
from loopkit.errors import DataError
from loopkit.evaluate import outputs_of
from loopkit.given import check_data, check_state
from loopkit.modes import eval_modes
from loopkit.nested import map_tensors
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@attrs.define
class EachForward:
    """The context of one forward: eval modes, and on several ranks the buffers of the first.

    Those are taken again after an update, which the body of a loop over predictions may make.
    """

    state: TrainState
    inference_mode: bool
    _step: int | None = None
    _buffers: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter it."""
        state = self.state
        if self._step != state.step:
            self._step, self._buffers = state.step, state.ranks.evaluating(state.model)
        gradless = torch.inference_mode() if self.inference_mode else torch.no_grad()
        with eval_modes(state), self._buffers, gradless:
            yield


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
    may train between two predictions. On several ranks each yields the outputs of all.

    Args:
        step: An eval step, or a plain function; only its forward runs.
        state: What predicts.
        data: Batches, in order.
        limit_batches: A number of batches, or a fraction of a sized loader; over all ranks.
        inference_mode: `torch.inference_mode`, else `torch.no_grad`.

    Raises:
        UsageError: For what is no state or no data.
        DataError: For a loader that shuffles, or empty data.

    Example:
        >>> import torch
        >>> state = TrainState(torch.nn.Linear(1, 1))
        >>> list(predict(lambda state, x: x + 1, state, [torch.zeros(2)]))
        [tensor([1., 1.])]
    """
    check_state("predict(step, state, data)", state)
    check_data("predict(step, state, data)", data)
    if _shuffles(data):
        raise DataError(
            "predict(step, state, loader)",
            "a loader that shuffles, so that predictions would not be in dataset order",
            "DataLoader(dataset, shuffle=False)",
        )

    context = EachForward(state, inference_mode)
    outputs = outputs_of(eval_step(step), state, data, limit_batches, context)
    if state.ranks.size > 1:
        return _in_order(outputs, state)
    return (output for _, output, _ in outputs)


def _in_order(outputs: Iterator[tuple[Any, Any, bool]], state: TrainState) -> Iterator[Any]:
    """The outputs of all ranks, on all ranks: each round's batches follow each other."""
    for _, output, filler in outputs:
        mine = map_tensors(lambda tensor: tensor.detach().cpu(), output)
        for theirs, is_filler in state.ranks.gather((mine, filler)):
            if not is_filler:
                yield to_device(theirs, state.device)


def _shuffles(data: Iterable[Any]) -> bool:
    """Whether a loader is known to; its sampler may stand within a batch sampler."""
    if not isinstance(data, DataLoader):
        return False
    if isinstance(data.sampler, DistributedSampler):  # deals out samples, not batches
        return data.sampler.shuffle or data.batch_size != 1
    samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
    return any(isinstance(sampler, SHUFFLING) for sampler in samplers)
