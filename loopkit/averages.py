"""Averaged weights: keeping them, and putting them in the model's place."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.errors import CompositionError, UsageError
from loopkit.given import check_state
from loopkit.state import TrainState

STATISTICS = "(statistics)"  # no name of a parameter


@attrs.frozen(eq=False)
class Averages:
    """Averaged weights.

    Attributes:
        weights: By name, of parameters (and of buffers, where asked for).
        statistics: Buffers that were computed for these weights, by name; see `update_bn`.
    """

    weights: dict[str, Tensor]
    statistics: dict[str, Tensor] = attrs.field(factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """The weights, and the statistics apart from them."""
        return self.weights | ({STATISTICS: self.statistics} if self.statistics else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back; the weights in place."""
        other = Averages.of(state_dict)
        if not self.weights:
            self.weights.update({name: w.clone() for name, w in other.weights.items()})
        for name, weight in self.weights.items():
            weight.copy_(other.weights[name])
        self.statistics.clear()
        self.statistics.update({name: t.clone() for name, t in other.statistics.items()})

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> "Averages":
        """What `state_dict` gave, without a copy."""
        weights = {name: value for name, value in state_dict.items() if name != STATISTICS}
        return cls(weights, dict(state_dict.get(STATISTICS, {})))


def averaged_of(state: TrainState, *, buffers: bool = False) -> dict[str, Tensor]:
    """What an average of the weights is of, by name: what is not whole numbers.

    Args:
        state: Whose model.
        buffers: Its buffers, too.
    """
    named: Iterable[tuple[str, Tensor]] = state.model.named_parameters()
    if buffers:
        named = itertools.chain(named, state.model.named_buffers())
    return {name: t for name, t in named if t.is_floating_point() or t.is_complex()}


def copies_of(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32 at least: an average in bf16 stands still once a step is below half a unit."""
    return {
        name: t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True)
        for name, t in named.items()
    }


def move(
    state: TrainState, averages: dict[str, Tensor], named: Mapping[str, Tensor], share: float
) -> None:
    """`average <- average + share * (weight - average)`, unless the update was skipped."""
    if not averages:
        return
    kept, applied = state.ranks.local([*averages.values()]), state.applied
    with torch.no_grad():
        cast = [named[name].to(average.dtype) for name, average in averages.items()]
        weights: list[Any] = state.ranks.local(cast)
        if isinstance(applied, Tensor):  # decided on the device: weigh by it rather than wait
            kinds = {(a.device, a.dtype) for a in kept}
            shares = {(device, dtype): applied.to(device, dtype) * share for device, dtype in kinds}
            torch._foreach_lerp_(kept, weights, [shares[a.device, a.dtype] for a in kept])
        elif applied:
            torch._foreach_lerp_(kept, weights, share)


def check_names(call: str, named: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """The averages are of the weights that the model has.

    Raises:
        CompositionError: If weights were added, removed or renamed.
    """
    if named.keys() != averages.keys():
        others = sorted(named.keys() ^ averages.keys())
        raise CompositionError(
            call,
            f"parameters that were added, removed or renamed since: {', '.join(others[:3])}",
            "all changes of the model before its first update, or a new lk.TrainState after them",
        )


def kept_averages(state: TrainState, name: str, call: str) -> Averages:
    """The averages that the state keeps under `name`, also those restored for its first update.

    Raises:
        UsageError: If it keeps none, or is no state.
    """
    check_state(call, state)
    kept = state.kept(name)
    if isinstance(kept, Averages) and not kept.weights:
        raise UsageError(
            call,
            f"an average that has not begun, at update {state.step}",
            "it after the update that with_swa starts at, or an earlier start",
        )
    if isinstance(kept, Averages):
        return kept
    if isinstance(kept, Mapping) and kept:  # restored: plain until the state's first update
        return Averages.of(kept)
    raise UsageError(
        call,
        f"a state that keeps {sorted({*state.features, *state.pending})}",
        "@lk.with_ema(0.999) on the step, and at least one update before",
    )


def ema_weights(state: TrainState, name: str = "ema") -> AbstractContextManager[None]:
    """Run with the averaged weights in the model's place: `with lk.ema_weights(state): ...`.

    The model's own weights come back at the end, bit for bit. A checkpoint written
    meanwhile holds them, too, and not the averages in their place.

    Args:
        state: A state trained by a step with `with_ema` or `with_swa`, or restored from one.
        name: The name that was given to `with_ema`; `"swa"` for `with_swa`.

    Raises:
        UsageError: If the state keeps no averages under that name, or they have not begun.

    Example:
        >>> from loopkit.decorators.ema import with_ema
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = with_ema(0.5)(lambda state, x: state.model(x).mean())
        >>> state = step(step(state, torch.ones(4, 1)), torch.ones(4, 1))
        >>> own = model.weight.item()
        >>> with ema_weights(state):
        ...     averaged = model.weight.item()
        >>> averaged > own, model.weight.item() == own
        (True, True)
    """
    kept = kept_averages(state, name, f"lk.ema_weights(state, {name!r})")
    return state.swapped(kept.weights | kept.statistics)
