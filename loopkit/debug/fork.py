"""Trying a step out on a copy, so that the state, the data and the random numbers stay."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from loopkit.compose import train_step
from loopkit.errors import DataError, UsageError
from loopkit.modes import untouched_rng
from loopkit.plain import is_stateful
from loopkit.position import Position
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction


def fork(
    step: Step | StepFunction, state: TrainState, *, training: bool = False
) -> tuple[Step, TrainState]:
    """A step and a state to try out: training the one with the other leaves both originals.

    The step is copied, too, for it may hold a scheduler over the state's optimizer; and the
    copy is set up for it, with a model in training mode if `training` says so.

    Raises:
        UsageError: If the state is none, or has no optimizer.
    """
    lifted = train_step(step)
    _check_state(state)
    branch = state.snapshot()
    if training and not branch.model.training:
        branch.model.train()
    memo: dict[int, Any] = {id(state.optimizer): branch.optimizer, id(state.model): branch.model}
    features, branch.set_up = copy.deepcopy((lifted.features, branch.set_up), memo)
    trial = Step(lifted.function, features)
    trial.set_up(branch)
    branch.data, branch.position, branch.batch, branch.ahead = None, Position(), 0, None
    branch.epoch += branch.epoch_end
    branch.epoch_end, branch.checkpoints = False, None
    return trial, branch


def loss_of(state: TrainState) -> float:
    """The loss of the last update: on several ranks the mean of theirs, lest they part."""
    return float(state.ranks.sum(state.loss.float().clone())) / state.ranks.size


@contextmanager
def on_the_side(call: str, state: TrainState, *loaders: Any) -> Iterator[None]:
    """Read from loaders, and leave them and the random numbers as they were.

    Args:
        call: What the user wrote, for an error.
        state: Whose device's random numbers stay, too.
        *loaders: Data that can be iterated over anew; None is none.

    Raises:
        UsageError: If the state is none.
        DataError: For an iterator, which would lose what is read from it.
    """
    _check_state(state)
    given = [loader for loader in loaders if loader is not None]
    for loader in given:
        if isinstance(loader, Iterator):
            raise DataError(
                call,
                f"an iterator ({type(loader).__name__}), which would lose the batches it gives",
                "data that can be iterated over anew: a list, or a loader",
            )
    positions = [(loader, loader.state_dict()) for loader in given if is_stateful(loader)]
    try:
        with untouched_rng(state.device, given):
            yield
    finally:
        for loader, position in positions:
            loader.load_state_dict(position)


def beside(data: Any) -> Any:
    """Data to read from in the other's stead: a loader keeps its workers for its own epochs.

    Workers that persist go on with their random numbers, and are reset by whoever reads next.
    """
    if isinstance(data, Mapping):
        return {name: beside(loader) for name, loader in data.items()}
    if not isinstance(data, DataLoader) or not data.persistent_workers:
        return data
    other = copy.copy(data)
    # DataLoader refuses to set it, lest its workers miss it; a copy without workers has none
    vars(other).update({"_iterator": None, "persistent_workers": False})
    return other


def _check_state(state: object) -> None:
    if not isinstance(state, TrainState):
        raise UsageError(
            "a trial of a step on a state",
            f"a {type(state).__name__} as the state",
            "lk.TrainState(model, optimizer) second, after the step",
        )
