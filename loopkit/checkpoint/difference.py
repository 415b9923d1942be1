"""What differs between a checkpoint and the state that it is to be loaded into."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.messages import RESTORE
from loopkit.checkpoint.read import Loaded
from loopkit.errors import CheckpointError
from loopkit.parts import Scattered
from loopkit.plain import is_plain, is_stateful
from loopkit.state import TrainState

SHOWN = 5  # of a list of names; the rest is counted


@attrs.frozen
class Differences:
    """What differs.

    Attributes:
        fatal: What cannot work.
        changes: What works, and takes the checkpoint's value.
    """

    fatal: tuple[str, ...]
    changes: tuple[str, ...]


def classes_of(state: TrainState) -> dict[str, str]:
    """The class of each part of a state that has one of its own."""
    parts: dict[str, object] = {"model": state.model, "optimizer": state.optimizer}
    for kind in ("features", "extras"):
        parts |= {f"{kind}.{k}": v for k, v in getattr(state, kind).items() if is_stateful(v)}
    return {name: "none" if p is None else type(p).__name__ for name, p in parts.items()}


def parameter_names(state: TrainState) -> list[list[str]]:
    """The names of the optimizer's parameters, group by group."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    groups = () if state.optimizer is None else state.optimizer.param_groups
    return [[names.get(id(p), "") for p in group["params"]] for group in groups]


def frozen_names(model: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """The names among `weights` of parameters that do not require gradients, tied ones too."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if name in weights and not p.requires_grad]


def without(weights: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The weights but for those of the names."""
    return {name: weight for name, weight in weights.items() if name not in {*names}}


def completed(state: TrainState, loaded: Loaded) -> dict[str, Any]:
    """The checkpoint's weights, and the state's own where frozen ones were left out."""
    here, saved = state.model.state_dict(), loaded.state["model"]
    return {**saved, **{name: here[name] for name in loaded.frozen if name in here}}


def differences(state: TrainState, manifest: Manifest, loaded: Loaded) -> Differences:
    """Compare a state with what a checkpoint holds; nothing is changed."""
    fatal = [
        *_class_differences(state, manifest),
        *_extras_differences(state, loaded),
        *_frozen_differences(state, loaded),
        *_model_differences(state.model.state_dict(), completed(state, loaded)),
        *_parameter_differences(parameter_names(state), loaded),
    ]
    changes = [] if fatal else [*_dtype_changes(state, loaded), *_value_changes(state, loaded)]
    return Differences(tuple(fatal), tuple(changes))


def _class_differences(state: TrainState, manifest: Manifest) -> Iterator[str]:
    saved, here = manifest.parts, classes_of(state)
    if state.optimizer is None:  # a state to evaluate: it takes the model, and that is all
        return
    for name in sorted({*here, *(name for name in saved if saved[name])}):
        if name.startswith("features.") and not state.features:
            continue  # before the first step; which will check them
        if name not in here:
            yield f"{name}: in the checkpoint, not in the state"
        elif name not in saved:
            yield f"{name}: in the state, not in the checkpoint"
        elif name != "model" and saved[name] and saved[name] != here[name]:
            yield f"{name}: {saved[name]} in the checkpoint, {here[name]} in the state"


def _frozen_differences(state: TrainState, loaded: Loaded) -> Iterator[str]:
    weights = state.model.state_dict()
    frozen = {*frozen_names(state.model, weights)}
    if gone := [name for name in loaded.frozen if name not in weights]:
        yield f"model: {shown(gone)} left out of the checkpoint as frozen, not in the state"
    if trained := [name for name in loaded.frozen if name in weights and name not in frozen]:
        yield f"model: {shown(trained)} left out of the checkpoint as frozen, trained in the state"


def _extras_differences(state: TrainState, loaded: Loaded) -> Iterator[str]:
    """Plain data that the state would keep as it is, where all else goes back."""
    if state.optimizer is None:
        return
    here = {n for n, value in state.extras.items() if is_plain(value) and not is_stateful(value)}
    for name in sorted(here - loaded.state["extras"].keys()):
        yield f"extras.{name}: in the state, not in the checkpoint"


def _model_differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    if missing := [name for name in here if name not in saved]:
        yield f"model: {shown(missing)} in the state, not in the checkpoint"
    if unexpected := [name for name in saved if name not in here]:
        yield f"model: {shown(unexpected)} in the checkpoint, not in the state"
    for name in mismatched(here, saved)[:SHOWN]:
        shapes = tuple(saved[name].shape), tuple(here[name].shape)
        yield f"model: {name} of shape {shapes[0]} in the checkpoint, {shapes[1]} in the state"


def mismatched(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that are in both, but have another shape there."""
    kinds = Tensor | Scattered
    both = [n for n in here if isinstance(here[n], Tensor) and isinstance(saved.get(n), kinds)]
    return [name for name in both if here[name].shape != saved[name].shape]


def _parameter_differences(here: list[list[str]], loaded: Loaded) -> Iterator[str]:
    saved = loaded.parameters
    if here and saved and here != saved:
        sizes = [*map(len, saved)], [*map(len, here)]
        if sizes[0] != sizes[1]:
            yield f"optimizer: groups of {sizes[0]} parameters in the checkpoint, {sizes[1]} here"
        else:
            yield "optimizer: the same number of parameters, in another order"


def _dtype_changes(state: TrainState, loaded: Loaded) -> Iterator[str]:
    weights = completed(state, loaded)
    for name, tensor in state.model.state_dict().items():
        saved = weights[name]
        if isinstance(tensor, Tensor) and tensor.dtype != getattr(saved, "dtype", None):
            yield f"model: {name} from {getattr(saved, 'dtype', saved)} to {tensor.dtype}"


def _value_changes(state: TrainState, loaded: Loaded) -> Iterator[str]:
    if state.optimizer is None or "param_groups" not in loaded.state["optimizer"]:
        return  # an optimizer of another kind says itself what it can take
    saved = loaded.state["optimizer"]["param_groups"]
    for i, (group, other) in enumerate(zip(state.optimizer.param_groups, saved, strict=False)):
        for key in sorted((group.keys() & other.keys()) - {"params", "param_names"}):
            if repr(group[key]) != repr(other[key]):
                yield f"optimizer: {key} of group {i} from {group[key]!r} to {other[key]!r}"


def shown(names: list[str]) -> str:
    """The first of the names, and how many there are more.

    Example:
        >>> shown(list("abcdefg"))
        'a, b, c, d, e and 2 more'
    """
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check(state: TrainState, manifest: Manifest, loaded: Loaded) -> tuple[str, ...]:
    """What the checkpoint changes in the settings of the state.

    Raises:
        CheckpointError: If it cannot be loaded into it, with all reasons.
    """
    found = differences(state, manifest, loaded)
    if found.fatal:
        raise CheckpointError(
            RESTORE,
            "another configuration:" + "".join(f"\n    {line}" for line in found.fatal),
            "the model, optimizer and decorators that the checkpoint was saved with;"
            " for its weights alone lk.load_weights(model, path)",
        )
    return found.changes
