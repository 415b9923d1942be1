"""Routing the parameters of a model to settings and optimizers."""

import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import attrs
from torch import nn

from loopkit.checked import check_model
from loopkit.errors import UsageError

KINDS = ("bias", "embedding", "kernel", "matrix", "norm")

Rules = Mapping[str | tuple[str, ...], Mapping[str, Any]]
"""Settings by kind or name pattern, or by a tuple of those; the first that fits counts."""


@attrs.frozen(eq=False)
class Named:
    """A parameter with all its names (tied ones have several) and its kind."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    kind: str

    def fits(self, pattern: str) -> bool:
        """Whether the pattern is its kind, or fits one of its names."""
        if pattern in KINDS:
            return pattern == self.kind
        return any(fnmatchcase(name, pattern) for name in self.names)


def named_parameters(model: nn.Module) -> list[Named]:
    """The parameters of the model with their names and kinds, tied ones once."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [Named(p, tuple(found), _kind(model, p, found)) for p, found in names.items()]


def _kind(model: nn.Module, parameter: nn.Parameter, names: list[str]) -> str:
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
        return "embedding"
    # By name, because most libraries have norms of their own: LlamaRMSNorm, T5LayerNorm
    if any(re.search(r"norm(\dd)?$", type(owner).__name__, re.IGNORECASE) for owner in owners):
        return "norm"
    return ("bias", "bias", "matrix")[parameter.ndim] if parameter.ndim < 3 else "kernel"


def param_groups(model: nn.Module, rules: Rules) -> list[dict[str, Any]]:
    """Param groups for an optimizer: each rule's parameters with the rule's settings.

    A rule is for a kind or for a name pattern (`"head.*"`, as in the shell), or for a
    tuple of those. The first rule that fits a parameter counts; parameters that none
    fits form a last group, without settings. `"optimizer"` among the settings routes
    the group to another optimizer than that of `create_optimizer`. Frozen parameters
    (`requires_grad` is false) are left out, tied ones are there once.

    Kinds: `"embedding"`: of an Embedding, or tied to one; `"norm"`: of a normalization;
    of the others, `"bias"`: vectors and scalars; `"matrix"`: two dimensions; `"kernel"`: more.

    Args:
        model: Whose parameters.
        rules: Settings by kind or pattern, the more special ones first.

    Returns:
        Groups for any torch optimizer, in the order of the rules; `group["name"]` says
        which rule made it.

    Raises:
        UsageError: If a kind or pattern fits nothing, or nothing that is left.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        >>> rules = {
        ...     "0.weight": {"lr": 1e-4},
        ...     ("bias", "norm"): {"weight_decay": 0.0},
        ...     "matrix": {"optimizer": "muon", "lr": 0.02},
        ... }
        >>> [(group["name"], len(group["params"])) for group in param_groups(model, rules)]
        [('0.weight', 1), ('bias, norm', 3), ('matrix', 1)]
    """
    check_model(model, "param_groups(model, rules)")
    if not isinstance(rules, Mapping):
        raise UsageError(
            f"param_groups(model, {rules!r:.60})",
            f"rules of type {type(rules).__name__}",
            'a mapping from patterns or kinds to settings: {"bias": {"weight_decay": 0.0}}',
        )
    every = named_parameters(model)
    rest = [named for named in every if named.parameter.requires_grad]
    if not rest:
        raise UsageError(
            f"param_groups({type(model).__name__}, ...)",
            f"no parameter to train among {len(every)}",
            "a model with parameters that require gradients",
        )
    groups = []
    for key, settings in rules.items():
        patterns = (key,) if isinstance(key, str) else key
        _check_rule(patterns, settings, rest, every)
        taken = [named for named in rest if any(map(named.fits, patterns))]
        rest = [named for named in rest if named not in taken]
        groups.append(_group(", ".join(patterns), taken, settings))
    return [*groups, _group("rest", rest, {})] if rest else groups


def _group(name: str, taken: list[Named], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": [named.parameter for named in taken], "name": name, **settings}


def _check_rule(
    patterns: tuple[str, ...], settings: object, rest: list[Named], every: list[Named]
) -> None:
    for pattern in patterns:
        call = f"param_groups(model, {{{pattern!r}: {settings!r:.40}}})"
        if not isinstance(settings, Mapping) or "params" in settings:
            found = "'params' among" if isinstance(settings, Mapping) else type(settings).__name__
            raise UsageError(call, f"{found} settings", 'settings such as {"lr": 0.1}')
        if not any(named.fits(pattern) for named in rest):
            raise UsageError(call, _found(pattern, every), _instead(pattern, every))


def _found(pattern: str, every: list[Named]) -> str:
    fitting = [named for named in every if named.fits(pattern)]
    if not fitting:
        return f"no parameter that fits {pattern!r}"
    if not any(named.parameter.requires_grad for named in fitting):
        return f"only frozen parameters that fit {pattern!r}"
    return f"that earlier rules have taken all {len(fitting)} parameters that fit {pattern!r}"


def _instead(pattern: str, every: list[Named]) -> str:
    if any(named.fits(pattern) for named in every):
        return "the more special rule first, or no such rule"
    names = [name for named in every for name in named.names]
    shown = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    kinds = sorted({named.kind for named in every})
    return f"a kind that the model has ({', '.join(kinds)}), or names such as {', '.join(shown)}"
