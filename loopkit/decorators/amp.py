"""Automatic mixed precision."""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.amp import GradScaler

from loopkit.check import one_of, positive
from loopkit.compose import Decorator, wrap
from loopkit.errors import NonFiniteError
from loopkit.state import TrainState
from loopkit.types import Backward, Forward, Output, Transform

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_AS = "amp"
MOST_SKIPS = 100  # in a row: the scale has fallen by 2**100 then


# `device.type` makes its text anew each time: among kernels 4 us, where this look-up takes 1
_TYPES: dict[torch.device, str] = {}


@attrs.frozen
class Autocast:
    """Forward in lower precision."""

    inner: Forward
    dtype: torch.dtype

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """Run the step function under autocast."""
        device = state.device
        kind = _TYPES.get(device) or _TYPES.setdefault(device, device.type)
        with torch.autocast(kind, self.dtype):
            return self.inner(state, batch)


@attrs.frozen
class ScaleLoss:
    """Backward of the scaled loss, so that small gradients do not underflow."""

    inner: Backward

    def __call__(self, state: TrainState, loss: Tensor) -> None:
        """Scale, then go on."""
        self.inner(state, state.features[KEPT_AS].scale(loss))


@attrs.frozen
class HeldHere:
    """Stands for an optimizer: torch's scaler takes no DTensors among plain tensors.

    What it finds is made known to all ranks below, so that it need not be by DTensor.
    """

    param_groups: list[dict[str, list[Tensor]]]

    @classmethod
    def of(cls, state: TrainState) -> "HeldHere":
        """The parts of a state's parameters, with their gradients, that this process holds."""
        parts = state.ranks.local([p.detach() for p in state.parameters_with_grad()])
        for part, gradient in zip(parts, state.ranks.local(state.gradients()), strict=True):
            part.grad = gradient
        return cls([{"params": parts}])


@attrs.frozen
class UnscaleGradients:
    """The scale leaves the gradients; where one overflowed, a vote to skip."""

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Unscale, vote, then go on."""
        scaler: Any = state.features[KEPT_AS]
        optimizer = HeldHere.of(state) if state.ranks.shards_tensors else state.optimizer
        # GradScaler has no public way to forget an update that an exception cut short, nor
        # to tell what it found without waiting for it.
        scaler._per_optimizer_states.clear()  # noqa: SLF001
        scaler.unscale_(optimizer)
        for overflowed in scaler._found_inf_per_device(optimizer).values():  # noqa: SLF001
            state.skip_if(state.ranks.largest(overflowed))  # in place: all change their scale
        self.inner(state)


@attrs.frozen
class UpdateScale:
    """The scale falls after an overflow and grows after a long time without."""

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Update the scale, then go on; an error where it has fallen for too long."""
        if not state.outcome.is_empty():  # torch's scaler has seen no gradient then, and says so
            state.features[KEPT_AS].update()
        self.inner(state)
        if state.applied is not True and state.skips.count(state) >= MOST_SKIPS:
            raise NonFiniteError(
                f'with_amp("fp16") at update {state.step}',
                f"{state.skips.in_a_row} updates in a row skipped, as their gradients were not"
                f" finite; the loss scale is down to {state.features[KEPT_AS].get_scale():.3g},"
                f" the loss is {state.loss.item():.4g}",
                'with_amp("bf16"), which has a wider range; a lower learning rate;'
                " lk.detect_overflow() on the step says which module it comes from",
            )


def _make_scaler(state: TrainState, init_scale: float) -> GradScaler:
    return GradScaler(state.device.type, init_scale=init_scale)


def with_amp(dtype: str | torch.dtype, *, init_scale: float = 2.0**16) -> Decorator:
    """Run the forward under autocast; with fp16 scale the loss as well.

    fp16: `backward(loss * scale)`, then gradients / scale before anything reads them
    (clipping included). Where a gradient overflowed the update is skipped, neither
    schedule nor averages advance, and the scale is halved; a hundred of those in a row are an
    error, for no scale will do. bf16 needs none of that.

    Args:
        dtype: `"bf16"` or `"fp16"`, or torch's dtypes of those.
        init_scale: First loss scale, for fp16.

    Raises:
        UsageError: For another dtype, or a scale that is not above 0.
        NonFiniteError: With fp16, where a hundred updates in a row were skipped.

    Example:
        >>> with_amp("bf16")
        with_amp('bf16')

    Source: https://docs.pytorch.org/docs/stable/amp.html, https://arxiv.org/abs/1710.03740
    """
    dtype = next((key for key, value in DTYPES.items() if value is dtype), dtype)
    name = f"with_amp({dtype!r})"
    autocast = functools.partial(Autocast, dtype=DTYPES[one_of(name, "dtype", dtype, (*DTYPES,))])
    if dtype == "bf16":
        return wrap(name=name, claims=("precision",), forward=autocast)
    scale = positive(name, "init_scale", init_scale)
    return wrap(
        name=name,
        claims=("precision",),
        init={KEPT_AS: functools.partial(_make_scaler, init_scale=scale)},
        forward=autocast,
        backward=ScaleLoss,
        unscale=UnscaleGradients,
        after=UpdateScale,
    )
