"""Making optimizers by name."""

import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.check import near
from loopkit.errors import UsageError
from loopkit.extras import extra
from loopkit.optim.combined import CombinedOptimizer

TORCH = {
    name.lower(): name
    for name in (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS"),
        *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
}
# By name: what pip calls the package, the module, the class.
EXTRAS = {
    "adam_4bit": ("torchao", "torchao.optim", "Adam4bit"),
    "adam_8bit": ("torchao", "torchao.optim", "Adam8bit"),
    "adam_fp8": ("torchao", "torchao.optim", "AdamFp8"),
    "adamw_4bit": ("torchao", "torchao.optim", "AdamW4bit"),
    "adamw_8bit": ("torchao", "torchao.optim", "AdamW8bit"),
    "adamw_fp8": ("torchao", "torchao.optim", "AdamWFp8"),
    "schedule_free_adamw": ("schedulefree", "schedulefree", "AdamWScheduleFree"),
    "schedule_free_radam": ("schedulefree", "schedulefree", "RAdamScheduleFree"),
    "schedule_free_sgd": ("schedulefree", "schedulefree", "SGDScheduleFree"),
}
LABELS = {"params", "param_names", "name", "optimizer", "initial_lr"}


def create_optimizer(
    params: Iterable[Any], name: str, lr: float | Tensor, **settings: Any
) -> Optimizer:
    """The optimizer of that name over the parameters.

    Names: those of torch.optim in lower case (adadelta, adafactor, adagrad, adam,
    adamax, adamw, asgd, lbfgs, muon, nadam, radam, rmsprop, rprop, sgd); with torchao
    adam_8bit, adam_4bit, adam_fp8 and the same with adamw; with schedulefree
    schedule_free_adamw, schedule_free_radam, schedule_free_sgd (call `optimizer.eval()`
    before evaluating, and `optimizer.train()` after).

    Groups that name another optimizer (`"optimizer": "muon"`, see `param_groups`) are
    given to that one, and the result is a `CombinedOptimizer`: `lr` and `weight_decay`
    are for all groups without their own, other settings for the optimizer `name` only.

    Args:
        params: Parameters, pairs of name and parameter, or param groups.
        name: Which optimizer.
        lr: Learning rate of all groups without their own.
        **settings: What that optimizer takes: `betas=(0.9, 0.95)`, `fused=True`.

    Raises:
        UsageError: For an unknown name or setting (with the one that is near), a learning
            rate below 0, no parameters, or ones that the optimizer cannot take.
        MissingExtraError: If the package that has it is not installed.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> create_optimizer(model.parameters(), "sgd", lr=0.1, momentum=0.9).defaults["momentum"]
        0.9
    """
    call = f"create_optimizer(params, {name!r:.40}, lr={lr!r:.40})"
    groups = _groups(call, params)
    _check_lr(call, lr)
    for group in groups:
        group.setdefault("optimizer", name)
    shared = {"lr": lr} | {k: settings[k] for k in settings if k == "weight_decay"}
    members: dict[str, Optimizer] = {}
    for member in dict.fromkeys(group["optimizer"] for group in groups):
        theirs = [group for group in groups if group["optimizer"] == member]
        own = settings if member == name else {}
        members[member] = _make(call, member, theirs, shared | own)
    if len(members) == 1:
        for group in groups:
            del group["optimizer"]
        return members.popitem()[1]
    combined = CombinedOptimizer(members)
    combined.param_groups[:] = groups  # in their given order: schedules are zipped with it
    return combined


def _groups(call: str, params: Any) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module | Tensor):
        raise UsageError(
            call,
            f"params of type {type(params).__name__}",
            "model.parameters(), a list, or configure_optimizer(model, ...)",
        )
    given = [*params]
    groups = [{**g} for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        if not isinstance(group.get("params"), Iterable) or isinstance(group["params"], Tensor):
            raise UsageError(
                call,
                f"a group {sorted(group)} whose params is no list",
                '{"params": [weight], ...}',
            )
        group["params"] = [*group["params"]]
    if not any(group["params"] for group in groups):
        raise UsageError(
            call, "no parameters", "model.parameters() made anew: an iterator can be read once"
        )
    return groups


def _check_lr(call: str, lr: object) -> None:
    number = isinstance(lr, int | float) and not isinstance(lr, bool)
    number = number or (isinstance(lr, Tensor) and lr.numel() == 1)
    if not (number and 0 <= float(lr) < math.inf):  # type: ignore[arg-type]
        raise UsageError(
            call, f"lr = {lr!r:.40} ({type(lr).__name__})", "lr: a number of 0 or more"
        )


def _make(
    call: str, name: str, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> Optimizer:
    made = _class(call, name)
    _check_known(call, name, settings, {*inspect.signature(made).parameters} - {"params"})
    if name == "muon":
        _check_matrices(call, groups)
    optimizer: Any = made(groups, **settings)
    for group in groups:
        _check_known(call, name, group, {*optimizer.defaults} | LABELS)
    if name.startswith("schedule_free"):
        optimizer.train()  # it refuses its first step otherwise
    return optimizer  # type: ignore[no-any-return]


def _class(call: str, name: str) -> Any:
    if name in TORCH:
        return getattr(torch.optim, TORCH[name])
    if name in EXTRAS:
        package, module, made = EXTRAS[name]
        return getattr(extra(module, package=package, wrote=call), made)
    raise UsageError(call, f"optimizer {name!r:.40}", _instead(str(name)))


def _instead(name: str) -> str:
    """The name that is near; for one of Hugging Face's `optim`, the same optimizer here."""
    word = re.sub("^paged_|_32bit|_torch|_bnb|_hf|_fused", "", name.lower())
    if word != name.lower() and word in {*TORCH, *EXTRAS}:
        return f"{word!r}" + ", fused=True" * name.endswith("_fused")
    return near(name, [*TORCH, *EXTRAS])


def _check_known(call: str, name: str, settings: Iterable[str], known: set[str]) -> None:
    for setting in settings:
        if setting not in known:
            raise UsageError(
                call, f"{setting!r}, which {name} does not take", near(setting, known - LABELS)
            )


def _check_matrices(call: str, groups: list[dict[str, Any]]) -> None:
    tensors = [p[1] if isinstance(p, tuple) else p for g in groups for p in g["params"]]
    shapes = [[*p.shape] for p in tensors if p.ndim != 2]
    if shapes:
        raise UsageError(
            call,
            f"{len(shapes)} parameters that are no matrices, the first of shape {shapes[0]}",
            'configure_optimizer(model, "muon", ...), which gives those to AdamW, or'
            ' param_groups(model, {"matrix": {"optimizer": "muon"}}) with another name',
        )
