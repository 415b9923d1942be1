"""An optimizer for a model, with weight decay where it belongs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checked import check_model
from loopkit.errors import UsageError
from loopkit.optim.create import create_optimizer
from loopkit.optim.groups import KINDS, Rules, named_parameters, param_groups


def configure_optimizer(
    model: nn.Module,
    name: str,
    lr: float | Tensor,
    weight_decay: float,
    *,
    no_decay: Sequence[str] = ("bias", "norm"),
    **settings: Any,
) -> Optimizer:
    """The optimizer of that name for a model, with groups for what decays and what does not.

    With `"muon"` the hidden matrices go to Muon and everything else to AdamW, with one
    learning rate for both (`adjust_lr_fn="match_rms_adamw"`). An output layer that is
    not tied to an embedding counts as a hidden matrix there; route it by its name with
    `param_groups` if it should not.

    Args:
        model: Whose parameters; frozen ones are left out, tied ones are there once.
        name: As for `create_optimizer`.
        lr: Learning rate.
        weight_decay: Of the parameters that decay.
        no_decay: Kinds (see `param_groups`; `"embedding"` is often added) and name
            patterns of the parameters that do not decay.
        **settings: What that optimizer takes: `betas=(0.9, 0.95)`, `fused=True`.

    Raises:
        UsageError: As for `create_optimizer`, and for a pattern that fits nothing.
        MissingExtraError: If the package that has it is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> optimizer = configure_optimizer(model, "adamw", lr=3e-4, weight_decay=0.1)
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["weight_decay"], len(group["params"]))
        no_decay 0.0 4
        decay 0.1 2
    """
    if isinstance(no_decay, str):
        raise UsageError(
            f"configure_optimizer(..., no_decay={no_decay!r})", "a str", f"no_decay=({no_decay!r},)"
        )
    check_model(model, f"configure_optimizer(model, {name!r:.40}, ...)")
    groups = param_groups(model, _rules(model, name, no_decay))
    if groups[-1]["name"] == "rest":
        groups[-1] |= {"name": "decay", "optimizer": "adamw" if name == "muon" else name}
    if name == "muon":
        settings = {"adjust_lr_fn": "match_rms_adamw", **settings}
    return create_optimizer(groups, name, lr, weight_decay=weight_decay, **settings)


def _rules(model: nn.Module, name: str, no_decay: Sequence[str]) -> Rules:
    kinds = {n.kind for n in named_parameters(model) if n.parameter.requires_grad}
    exempt = tuple(word for word in no_decay if word not in KINDS or word in kinds)
    other = {"optimizer": "adamw"} if name == "muon" else {}
    rules: dict[str | tuple[str, ...], dict[str, Any]] = {}
    if exempt:
        rules[exempt] = {"name": "no_decay", "weight_decay": 0.0, **other}
    if name == "muon":
        rules["matrix"] = {"name": "muon"}
    return rules
