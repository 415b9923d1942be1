"""Exponential moving averages of the weights."""

import functools
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.check import fraction
from loopkit.compose import Decorator, wrap
from loopkit.errors import CompositionError, UsageError
from loopkit.state import TrainState
from loopkit.types import Transform


@attrs.frozen(eq=False)
class Averages:
    """The averaged weights, by parameter name."""

    weights: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return dict(self.weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weights back, in place."""
        for name, weight in self.weights.items():
            weight.copy_(state_dict[name])


@attrs.frozen
class UpdateAverages:
    """The layer of `with_ema`."""

    inner: Transform
    decay: float
    name: str

    def __call__(self, state: TrainState) -> None:
        """Move the averages towards the weights, unless the update was skipped."""
        averages = state.features[self.name].weights
        named = _averaged(state)
        if named.keys() != averages.keys():
            _refuse(self.name, sorted(named.keys() ^ averages.keys()))
        with torch.no_grad():
            weights = [named[name].to(average.dtype) for name, average in averages.items()]
            mine, theirs = state.ranks.local([*averages.values()]), state.ranks.local(weights)
            _lerp(mine, theirs, 1 - self.decay, state.applied)
        self.inner(state)


def _lerp(averages: list[Tensor], weights: list[Any], share: float, applied: bool | Tensor) -> None:
    if not averages:
        return
    if isinstance(applied, Tensor):  # decided on the device: weigh by it rather than wait for it
        kinds = {(a.device, a.dtype) for a in averages}
        shares = {(device, dtype): applied.to(device, dtype) * share for device, dtype in kinds}
        torch._foreach_lerp_(averages, weights, [shares[a.device, a.dtype] for a in averages])
    elif applied:
        torch._foreach_lerp_(averages, weights, share)


def _averaged(state: TrainState) -> dict[str, Tensor]:
    named = state.model.named_parameters()
    return {name: p for name, p in named if p.is_floating_point() or p.is_complex()}


def _refuse(name: str, others: list[str]) -> None:
    raise CompositionError(
        f"with_ema(..., name={name!r})",
        f"parameters that were added, removed or renamed since: {', '.join(others[:3])}",
        "all changes of the model before its first update, or a new lk.TrainState after them",
    )


def _make_averages(state: TrainState) -> Averages:
    """In float32 at least: an average in bf16 stands still once a step is below half a unit."""
    return Averages(
        {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in _averaged(state).items()
        }
    )


def with_ema(decay: float, *, name: str = "ema") -> Decorator:
    """Keep an exponential moving average of the weights.

    `average <- average + (1 - decay) * (weight - average)` after each applied update,
    from the weights before the first one. Buffers (BatchNorm statistics are averages
    already) stay the model's own. Use them with `ema_weights`; they are saved with
    the state, never as the model.

    Args:
        decay: Close to 1: the average looks back about `1 / (1 - decay)` updates.
        name: Where the state keeps them; two averages need two names.

    Raises:
        UsageError: If decay is not between 0 and 1.

    Example:
        >>> with_ema(0.999)
        with_ema(0.999)

    Source: https://arxiv.org/abs/1907.08610, torch.optim.swa_utils
    """
    shown = f"with_ema({decay})" if name == "ema" else f"with_ema({decay}, name={name!r})"
    share = fraction(shown, "decay", decay)
    layer = functools.partial(UpdateAverages, decay=share, name=name)
    return wrap(name=shown, init={name: _make_averages}, after=layer)


def ema_weights(state: TrainState, name: str = "ema") -> AbstractContextManager[None]:
    """Run with the averaged weights in the model's place: `with lk.ema_weights(state): ...`.

    The model's own weights come back at the end, bit for bit. A checkpoint written
    meanwhile holds them, too, and not the averages in their place.

    Args:
        state: A state trained by a step with `with_ema`, or restored from one.
        name: The name that was given to `with_ema`.

    Raises:
        UsageError: If the state keeps no averages under that name.
    """
    kept = state.kept(name)
    if kept is not None:  # the restored weights of a state that was not trained yet are plain
        return state.swapped(kept.weights if isinstance(kept, Averages) else kept)
    raise UsageError(
        f"lk.ema_weights(state, {name!r})",
        f"a state that keeps {sorted({*state.features, *state.pending})}",
        "@lk.with_ema(0.999) on the step, and at least one update before",
    )
