"""The optimizer's step within the backward pass, so that gradients need not be kept."""

import threading
from typing import Any, NoReturn

import attrs
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from loopkit.compose import Decorator, own
from loopkit.errors import CompositionError, OutputError
from loopkit.state import TrainState
from loopkit.types import Recompute
from loopkit.window import MicroBatches


@attrs.define(eq=False)
class StepOne:
    """Steps an optimizer for a single parameter, once its gradient is there, and frees that.

    The optimizer itself is made to see that parameter alone for the moment, so that its
    state, groups and hooks are the usual ones, whatever optimizer it is.
    """

    optimizer: Optimizer
    owners: dict[nn.Parameter, tuple[Optimizer, dict[str, Any]]]
    stepped: set[nn.Parameter] = attrs.field(factory=set)
    one_at_a_time: Any = attrs.field(factory=threading.Lock)  # each device has a backward thread

    def __call__(self, parameter: Any) -> None:
        """Update the parameter, and free its gradient."""
        member, group = self.owners[parameter]
        alone = {**group, "params": [parameter]}
        with self.one_at_a_time:
            groups, member.param_groups = member.param_groups, [alone]
            try:
                member.step()
            finally:
                member.param_groups = groups
        if parameter not in self.stepped:
            _check_group(member, group, alone)
            self.stepped.add(parameter)
        parameter.grad = None


def _check_group(optimizer: Optimizer, group: dict[str, Any], alone: dict[str, Any]) -> None:
    changed = [key for key in alone if key != "params" and alone[key] is not group.get(key)]
    if changed:
        _refuse(optimizer, f"an optimizer that keeps {changed} for all parameters of a group")


def _refuse(optimizer: Optimizer, found: str) -> NoReturn:
    raise CompositionError(
        f"with_optimizer_in_backward() for {type(optimizer).__name__}",
        found,
        "an optimizer whose parameters are independent: AdamW, SGD, Adafactor, Muon, ...",
    )


@attrs.frozen
class GradientsThatUpdate:
    """The owner of `apply`: the gradients are computed now, and each updates its parameter."""

    def __call__(self, state: TrainState, recompute: Recompute) -> bool:
        """Hooks on the parameters for the time of the backward pass; false if none was reached."""
        optimizer: Any = state.optimizer
        if isinstance(optimizer, LBFGS):
            _refuse(optimizer, "an optimizer that evaluates the loss itself")
        members = getattr(optimizer, "optimizers", {})  # of a CombinedOptimizer
        groups = optimizer.param_groups
        owners = {
            parameter: (members.get(group.get("optimizer"), optimizer), group)
            for group in groups
            for parameter in group["params"]
        }
        step = StepOne(optimizer, owners)
        hooks = [p.register_post_accumulate_grad_hook(step) for p in owners if p.requires_grad]
        try:
            recompute(state)
        finally:
            for hook in hooks:
                hook.remove()
        if not step.stepped and not state.votes:  # no vote to skip: it is no mean over nothing
            raise OutputError(
                "the loss of a step with with_optimizer_in_backward()",
                f"no gradient for any of the {len(owners)} parameters of {state!r}",
                "a loss computed with state.model, not with another copy of the model",
            )
        return bool(step.stepped)


@attrs.frozen
class Gradients:
    """Computes the gradients of the update, when `apply` asks for them."""

    parts: Any
    window: MicroBatches

    def __call__(self, state: TrainState) -> Tensor:
        """Compute them; returns the loss."""
        self.parts.gradients(state, self.window)
        return state.loss


@attrs.frozen
class UpdateInBackward:
    """The owner of `update`: layers of `apply` (schedules) come first, then the gradients."""

    parts: Any

    def __call__(self, state: TrainState, window: MicroBatches) -> bool | Tensor:
        """Update the weights; false where there was nothing to update."""
        return self.parts.apply(state, Gradients(self.parts, window))  # type: ignore[no-any-return]


def with_optimizer_in_backward() -> Decorator:
    """Step the optimizer for each parameter within the backward pass, and free its gradient.

    Never more than a few gradients exist at once, so that their memory (as much as the
    weights') is saved. The numbers are those of the plain step, bit for bit; the optimizer,
    its `state_dict`, schedules and averages are the usual ones. As gradients never exist
    together, nothing can read them all: with clipping, gradient accumulation, fp16's loss
    scale, SAM, several ranks or skipping non-finite updates it is an error. An error in the
    backward pass leaves the model partly updated.

    Raises:
        CompositionError: Beside what needs all gradients; for an optimizer that keeps values
            for a whole group (schedule-free ones).

    Example:
        >>> with_optimizer_in_backward()
        with_optimizer_in_backward()

    Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
    """
    return own(
        name="with_optimizer_in_backward()",
        apply=GradientsThatUpdate(),
        update=UpdateInBackward,
        excludes=("gradients", "split", "unscale", "transform", "verdict"),
    )
