"""Checking what a state is made of."""

from typing import Any

from torch import nn

from loopkit.errors import UsageError


def check_model(model: object) -> None:
    """Check that it is a module.

    Raises:
        UsageError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            "lk.TrainState(model, optimizer)",
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
