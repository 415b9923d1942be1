"""Several optimizers that behave as one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopkit.check import near
from loopkit.errors import CompositionError, UsageError


class CombinedOptimizer(Optimizer):
    """One optimizer made of several, each for param groups of its own.

    The param groups are the members' own dicts, and all members share one `state`, so
    schedules, `zero_grad`, `state_dict` and copies see one torch optimizer with the
    usual format. `group["optimizer"]` says whose a group is. `step` steps each member.

    Args:
        optimizers: The members by name, over different parameters. From now on they
            are used through this optimizer only.

    Attributes:
        optimizers: The members by name.

    Raises:
        UsageError: If there are none.
        CompositionError: If two of them hold the same parameter.

    Example:
        >>> a, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        >>> members = {"muon": torch.optim.Muon([a]), "adamw": torch.optim.AdamW([b])}
        >>> optimizer = CombinedOptimizer(members)
        >>> [group["optimizer"] for group in optimizer.param_groups]
        ['muon', 'adamw']

    Source: https://github.com/pytorch/pytorch/issues/166208
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.optimizers = dict(optimizers)
        _check_members(self.optimizers)
        for name, member in self.optimizers.items():
            for group in member.param_groups:
                group["optimizer"] = name
        super().__init__([g for m in self.optimizers.values() for g in m.param_groups], {})
        for member in self.optimizers.values():
            self.state.update(member.state)
        self._hand_down()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each member, in order.

        Args:
            closure: Computes the loss anew; called once, before the first member's step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.optimizers.values():
            member.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the member that `param_group["optimizer"]` names.

        Raises:
            UsageError: If it names none.
        """
        name = param_group.get("optimizer")
        if name not in self.optimizers:
            raise UsageError(
                "optimizer.add_param_group(group)",
                f'group["optimizer"] = {name!r}',
                near(str(name), self.optimizers),
            )
        member = self.optimizers[name]
        if not any(param_group is group for group in member.param_groups):
            member.add_param_group(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UsageError: If the groups were those of other optimizers.
        """
        mine = [group["optimizer"] for group in self.param_groups]
        saved = [group.get("optimizer") for group in state_dict["param_groups"]]
        if mine != saved:
            raise UsageError(
                "optimizer.load_state_dict(...)",
                f"param groups of {saved}",
                f"the state of an optimizer with param groups of {mine}",
            )
        super().load_state_dict(state_dict)
        self._hand_down()

    def _hand_down(self) -> None:
        """Make the groups and the state of the members those of this optimizer."""
        for name, member in self.optimizers.items():
            groups = [group for group in self.param_groups if group["optimizer"] == name]
            member.__setstate__({"state": self.state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}


def _check_members(optimizers: Mapping[str, Optimizer]) -> None:
    call = f"CombinedOptimizer({{{', '.join(map(repr, optimizers))}}})"
    if not optimizers:
        raise UsageError(call, "no optimizers", 'CombinedOptimizer({"muon": ..., "adamw": ...})')
    owners: dict[Tensor, str] = {}
    for name, member in optimizers.items():
        for parameter in (p for group in member.param_groups for p in group["params"]):
            if owners.setdefault(parameter, name) != name:
                raise CompositionError(
                    call,
                    f"a parameter of shape {[*parameter.shape]} in both {owners[parameter]!r}"
                    f" and {name!r}",
                    "each parameter in one optimizer; param_groups(model, rules) takes care of it",
                )
