"""Checking what a state is made of, and what it is given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import UsageError
from loopkit.ranks import Ranks

# By name, so that nothing is imported for it; torch's first one has namesakes elsewhere
WRAPPERS = {"DistributedDataParallel": "", "FullyShardedDataParallel": '"fsdp"'}


def check_model(model: object, call: str) -> None:
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


def check_trained(model: object) -> None:
    """Check that it is a module, and that nothing wraps it which `distributed` is there for.

    Raises:
        UsageError: If not.
    """
    check_model(model, "lk.TrainState(model, optimizer)")
    for name, module in model.named_modules():  # type: ignore[attr-defined]
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                _refuse_wrapped(f"model.{name}" if name else "model", kind.__name__)


def _refuse_wrapped(name: str, kind: str) -> None:
    raise UsageError(
        f"lk.TrainState(model, optimizer) with a {kind} as {name}",
        "gradients averaged by the wrapper, of which a step knows nothing: each rank would take"
        " all of the data, sync each micro-batch, and save and evaluate by itself",
        f"the plain module ({name}.module), an optimizer over its parameters, and"
        f" @lk.distributed({WRAPPERS[kind]}) on the step",
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
        UsageError: If it is none.
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
