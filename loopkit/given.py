"""Checking what a function is given, where a wrong thing would fail far from its line."""

from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from loopkit.errors import UsageError
from loopkit.state import TrainState


def check_state(call: str, state: object) -> None:
    """Check that it is a state.

    Raises:
        UsageError: If it is none.

    Example:
        >>> check_state("f(state)", TrainState(nn.Linear(1, 1)))
    """
    if not isinstance(state, TrainState):
        raise UsageError(
            call,
            f"a {type(state).__name__} as the state",
            "a state, lk.TrainState(model) or lk.TrainState(model, optimizer), in its place",
        )


def check_data(call: str, data: Any) -> None:
    """Check that batches may come from it: not a model, nor a dataset of single samples.

    Raises:
        UsageError: If they cannot.

    Example:
        >>> check_data("f(data)", [1, 2])
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise UsageError(
            call,
            f"a {type(data).__name__}, whose items are single samples, as the data",
            "a loader: DataLoader(dataset, batch_size=32, shuffle=True); batch_size=None if its"
            " items are batches",
        )
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if not iterable or isinstance(data, nn.Module):
        raise UsageError(
            call, f"a {type(data).__name__} as the data", "a loader, or any iterable of batches"
        )
