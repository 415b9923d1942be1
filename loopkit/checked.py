"""Checking what a state is made of, and what it is given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import UsageError
from loopkit.ranks import Ranks


def check_model(model: object, call: str = "lk.TrainState(model, optimizer)") -> None:
    """Check that it is a module.

    Raises:
        UsageError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            call,
            f"a model of type {type(model).__name__}",
            "a torch.nn.Module as the model",
        )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Check that it is an optimizer, over parameters of the model.

    Raises:
        UsageError: If it is not.
    """
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state_dict"):
        raise UsageError(
            "lk.TrainState(model, optimizer)",
            f"an optimizer of type {type(optimizer).__name__}",
            "a torch.optim.Optimizer, or an object with its param_groups and state_dict",
        )
    own = {id(parameter) for parameter in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if own and not any(id(parameter) in own for parameter in held):
        raise UsageError(
            "lk.TrainState(model, optimizer)",
            f"{len(held)} parameters in the optimizer, none of them among the model's {len(own)}",
            "an optimizer over model.parameters(), made from this very model",
        )


def check_parts(
    state_dict: Mapping[str, Any], parts: set[str], features: Mapping[str, Any]
) -> None:
    """Check that a state dict has all parts, and something for each feature that the state keeps.

    Raises:
        UsageError: If not.
    """
    if parts != state_dict.keys():
        raise UsageError(
            "state.load_state_dict(...)",
            f"parts {sorted(state_dict)}",
            f"a dict with exactly the parts {sorted(parts)}, as state.state_dict() gives it",
        )
    if lost := sorted(features.keys() - state_dict["features"].keys()):
        raise UsageError(
            "state.load_state_dict(...)",
            f"nothing for {lost}, which this state has kept since it was trained",
            "a fresh lk.TrainState for what was saved without it",
        )


def as_vote(vote: Tensor | bool, ranks: Ranks) -> Tensor:
    """A vote as a 0-d tensor, 1 where it is true.

    Raises:
        UsageError: For a bool on several ranks.
    """
    if not ranks.alone and not isinstance(vote, Tensor):
        raise UsageError(
            f"state.skip_if({vote!r}) on several ranks",
            "a bool, which only this rank may have; ranks vote together, or wait in vain",
            "state.skip_if(torch.tensor(flag, device=state.device)), on every rank, each update",
        )
    return (torch.as_tensor(vote).detach() != 0).float()
