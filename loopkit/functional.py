"""Optimizers of torch in their functional form, over the state that the optimizer keeps."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch._dynamo import mark_static_address
from torch.optim import Optimizer

# For each optimizer of torch.optim: the lists that its functional form takes after parameters and
# gradients, in order, by their names in `optimizer.state`; and the setting without which
# a list stays empty (or, of momentum buffers, a list of None).
_LISTS = {
    "Adadelta": ("square_avg", "acc_delta", "step"),
    "Adagrad": ("sum", "step"),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    "Adamax": ("exp_avg", "exp_inf", "step"),
    "NAdam": ("exp_avg", "exp_avg_sq", "mu_product", "step"),
    "RAdam": ("exp_avg", "exp_avg_sq", "step"),
    "RMSprop": ("square_avg", "grad_avg", "momentum_buffer", "step"),
    "SGD": ("momentum_buffer",),
}
_NEEDS = {"max_exp_avg_sq": "amsgrad", "grad_avg": "centered", "momentum_buffer": "momentum"}
_COUNTERS = ("step", "mu_product")
_TRACED = {"foreach": True, "capturable": True}


@attrs.frozen
class Group:
    """One param group, bound: what the functional form reads and changes.

    Attributes:
        settings: The optimizer's own param group.
        lists: For each list of the functional form, the optimizer's own tensors.
        rate: The learning rate as a tensor, so that a schedule needs no other graph.
    """

    settings: dict[str, Any]
    lists: list[list[Any]]
    rate: Tensor


@attrs.define
class Form:
    """An optimizer's functional form; made by `functional_form`.

    Attributes:
        function: Such as `torch.optim.adamw.adamw`.
        names: Of the lists that it takes, in the optimizer's state.
        keys: Of the param group, that it takes by name.
        in_graphs: Whether it goes into CUDA graphs, which change memory in place that they know.
    """

    function: Callable[..., None]
    names: tuple[str, ...]
    keys: tuple[str, ...]
    in_graphs: bool = False
    _rates: list[Tensor] = attrs.field(factory=list)

    def bind(self, optimizer: Optimizer) -> list[Group] | None:
        """The optimizer's own tensors; None before it has made them, in its first step.

        They are looked up at each update: `load_state_dict` puts others in their place.
        """
        state, groups = optimizer.state, []
        for i, group in enumerate(optimizer.param_groups):
            needed = [n for n in self.names if n not in _NEEDS or group[_NEEDS[n]]]
            parameters = [p for p in group["params"] if p.requires_grad]
            kept = [state.get(p, {}) for p in parameters]
            if self.in_graphs:
                _hold_still(group, parameters, kept)
            try:
                columns = {name: [k[name] for k in kept] for name in needed}
            except KeyError:
                return None
            if any(None in column for column in columns.values() if column and column[0] is None):
                return None
            lists = [
                columns[n] if n in columns else [None] * len(kept) * (n == "momentum_buffer")
                for n in self.names
            ]
            groups.append(Group(group, lists, self._rate(i, group["lr"], parameters)))
        return groups

    def _rate(self, index: int, rate: float | Tensor, parameters: list[Tensor]) -> Tensor:
        device = parameters[0].device if parameters else torch.device("cpu")
        if isinstance(rate, Tensor) and rate.device == device:
            return rate
        if index == len(self._rates):
            self._rates.append(torch.zeros((), device=device))
        held = self._rates[index]
        if held.device != device:
            held = self._rates[index] = torch.zeros((), device=device)
        if isinstance(rate, Tensor):  # read from a checkpoint, it lies on the host
            return held.copy_(rate, non_blocking=True)
        return held.fill_(rate)

    def update(self, groups: list[Group], verdict: Tensor | None) -> Tensor | None:
        """Update weights and state in place, but where the verdict says skip; to be traced.

        Returns:
            Whether the update was applied, as a 0-d tensor; None where nobody voted.
        """
        with torch.no_grad():
            for group in groups:
                self._update_group(group, verdict)
        return None if verdict is None else verdict == 0

    def _update_group(self, group: Group, verdict: Tensor | None) -> None:
        trained = [p for p in group.settings["params"] if p.requires_grad]
        chosen = [i for i, p in enumerate(trained) if p.grad is not None]
        if not chosen:
            return
        parameters = [trained[i] for i in chosen]
        gradients = [trained[i].grad for i in chosen]
        lists = [[column[i] for i in chosen] if column else [] for column in group.lists]
        changed = [*parameters, *(t for column in lists for t in column if t is not None)]
        before = [] if verdict is None else [t.detach().clone() for t in changed]
        self.function(parameters, gradients, *lists, **self._settings(group))
        if verdict is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(verdict.to(tensor.device) == 0, tensor, old))

    def _settings(self, group: Group) -> dict[str, Any]:
        given: dict[str, Any] = {k: v for k, v in _TRACED.items() if k in self.keys}
        for key in self.keys:
            if key in {"beta1", "beta2"}:
                given[key] = group.settings["betas"][key == "beta2"]
            elif key == "lr":
                given[key] = group.rate
            elif key in group.settings and key not in {*_TRACED, "fused", "differentiable"}:
                given[key] = group.settings[key]
        return given


def _hold_still(group: dict[str, Any], parameters: list[Tensor], kept: list[Any]) -> None:
    """Make of an optimizer's state what CUDA graphs can change in place.

    A counter on the host, or memory that may lie elsewhere next time, keeps torch from making any
    graph. Dynamo does the same to optimizers whose `step` it traces
    (torch/_dynamo/variables/optimizer.py), but puts counters on the device before their first use.
    """
    for parameter, own in zip(parameters, kept, strict=True):
        for name in _COUNTERS if "capturable" in group and not parameter.is_cpu else ():
            if name in own and own[name].is_cpu:
                own[name] = own[name].to(parameter.device)
                group["capturable"] = True  # its own `step`, uncompiled, takes them there then
        for tensor in own.values():
            if isinstance(tensor, Tensor) and not hasattr(tensor, "_dynamo_static_input_type"):
                mark_static_address(tensor, guard=False)


def functional_form(optimizer: Any, *, in_graphs: bool = False) -> Form | None:
    """The functional form of an optimizer, or None for one that has none that is known.

    Known are those of torch.optim themselves (no subclasses, which may do other things) over
    parameters that are dense and real.

    Example:
        >>> functional_form(torch.optim.SGD([torch.zeros(1)], lr=0.1)).function.__name__
        'sgd'
    """
    kind = type(optimizer)
    if kind is not getattr(torch.optim, kind.__name__, None) or kind.__name__ not in _LISTS:
        return None
    if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
        return None
    function = getattr(sys.modules[kind.__module__], kind.__name__.lower())
    keys = inspect.signature(function).parameters.keys() - {"params"}
    return Form(function, _LISTS[kind.__name__], tuple(sorted(keys)), in_graphs)
