"""Finding the module that made the first infinity or NaN, or lost a signal to rounding."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loopkit.compose import Decorator, wrap
from loopkit.errors import NonFiniteError
from loopkit.nested import leaves_of
from loopkit.state import TrainState
from loopkit.types import Forward

SHOWN = 5  # modules of the trace in an error
LARGER = (
    "bf16, whose range is that of fp32, in place of fp16; a smaller lr, lk.with_clip(1.0), or a"
    " norm before this module; lk.with_anomaly_detection() for the line of the backward pass"
)
SMALLER = (
    'bf16 or fp32 in place of fp16; lk.with_amp("fp16"), which scales the loss; a module that'
    " does not saturate or die"
)


@attrs.frozen
class Range:
    """What some tensors hold: the largest absolute value, and whether all are finite.

    Attributes:
        largest: The largest absolute value; NaN where there is one.
        tiny: Below this, the dtype has lost precision, or everything.
        dtype: Of the first tensor.
    """

    largest: float
    tiny: float
    dtype: torch.dtype | None

    @classmethod
    def of(cls, tree: Any) -> "Range":
        """The range of the floating-point tensors in a tree; waits for the device."""
        found = [t.detach() for t in leaves_of(tree) if isinstance(t, Tensor)]
        found = [t for t in found if t.is_floating_point() and t.numel()]
        if not found:
            return cls(0.0, 0.0, None)
        largest = torch.stack([t.abs().amax().float().cpu() for t in found]).amax()
        return cls(float(largest), torch.finfo(found[0].dtype).tiny, found[0].dtype)

    @property
    def is_finite(self) -> bool:
        """Whether all values are."""
        return self.largest < float("inf")  # false for NaN

    @property
    def is_lost(self) -> bool:
        """Whether nothing is left that the dtype can say with full precision."""
        return self.dtype is not None and self.largest < self.tiny

    def __str__(self) -> str:
        return "none" if self.dtype is None else f"{self.largest:.3g}"


@attrs.frozen
class Frame:
    """One module's pass: its name, its type, and the ranges that it saw."""

    name: str
    kind: str
    inputs: Range
    weights: Range
    outputs: Range

    def __str__(self) -> str:
        dtype = str(self.outputs.dtype).removeprefix("torch.")
        return (
            f"{self.name} ({self.kind}, {dtype}): |input| <= {self.inputs},"
            f" |weight| <= {self.weights}, |output| <= {self.outputs}"
        )


@attrs.define
class Trace:
    """The modules that have run in one forward pass, in the order in which they ended.

    Attributes:
        update: Which update it is.
        underflow: Whether losing all precision counts.
        frames: What they saw.
    """

    update: int
    underflow: bool
    frames: list[Frame] = attrs.field(factory=list)

    def after(self, module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        """Look at a module that has run; and at its output's gradient, when that comes."""
        weights = [*module.parameters(recurse=False)]
        kind = type(module).__name__
        frame = Frame(name, kind, Range.of(inputs), Range.of(weights), Range.of(output))
        self.frames.append(frame)
        if not frame.outputs.is_finite:
            self._refuse(self._source(frame), LARGER)
        if self.underflow and frame.outputs.is_lost and not frame.inputs.is_lost:
            self._refuse(f"nothing above the smallest normal number from {frame}", SMALLER)
        for tensor in leaves_of(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                look = functools.partial(self.gradient, at=len(self.frames) - 1)
                tensor.register_hook(look)  # type: ignore[no-untyped-call]

    def _source(self, frame: Frame) -> str:
        value = "NaN" if frame.outputs.largest != frame.outputs.largest else "infinity"
        if not frame.weights.is_finite:
            return f"a weight that is not finite, before the forward pass, in {frame}"
        if not frame.inputs.is_finite:
            return f"an input that is not finite, which no module has made, to {frame}"
        return f"the first {value} in the output of {frame}"

    def gradient(self, gradient: Tensor, at: int) -> None:
        """Look at the gradient of a module's output."""
        found, frame = Range.of(gradient), self.frames[at]
        by = f"the backward of {self._reader(at)}"
        what = f"the gradient of the output of {frame.name} ({frame.kind}), from {by} or after it"
        if not found.is_finite:
            self._refuse(
                f"the first gradient that is not finite (|gradient| {found}): {what}", LARGER
            )
        if self.underflow and found.is_lost:
            self._refuse(f"nothing above the smallest normal number in {what}", SMALLER)

    def _reader(self, at: int) -> str:
        """The module that ran next, which is no part of an enclosing one's end."""
        name = self.frames[at].name
        later = (f.name for f in self.frames[at + 1 :] if f.name != "the model")
        return next((n for n in later if not name.startswith(f"{n}.")), "the loss")

    def loss(self, output: Any) -> None:
        """Look at what the step function returned, after all modules."""
        if not Range.of(output).is_finite:
            self._refuse("a loss or output that is not finite, made after the last module", LARGER)

    def _refuse(self, found: str, instead: str) -> None:
        lines = "".join(f"\n    {frame}" for frame in self.frames[-SHOWN:])
        before = f"; the modules before, the last one last:{lines}" if lines else ""
        raise NonFiniteError(
            f"detect_overflow() in the update after {self.update}", found + before, instead
        )


@attrs.frozen
class Watch:
    """The layer of `detect_overflow`."""

    inner: Forward
    underflow: bool

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """The forward pass, with a look at every module."""
        trace = Trace(state.step, self.underflow)
        with _hooked(state.model, trace.after):
            output = self.inner(state, batch)
        trace.loss(output)
        return output


@contextmanager
def _hooked(model: nn.Module, look: Callable[..., None]) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            hook = functools.partial(_ignore_result, look, name or "the model")
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ignore_result(
    look: Callable[..., None], name: str, module: nn.Module, inputs: Any, output: Any
) -> None:
    look(module, inputs, output, name)


def detect_overflow(*, underflow: bool = False) -> Decorator:
    """Find the module that makes the first infinity or NaN: slow, for debugging.

    It looks at every module's inputs, weights and outputs in the forward pass, at the
    gradients of the outputs in the backward pass, and at the loss. The first that is not
    finite raises an error that names the module, tells what it was given from what it made,
    and lists the modules before it with their largest absolute values. With fp16 and loss scaling
    gradients may overflow while the scale is being found; that is no mistake, but is found.

    Args:
        underflow: Also raise where nothing is left above the smallest normal number of the
            dtype: an output, from an input that was above it; or the gradient of an output.

    Raises:
        NonFiniteError: In the forward or the backward pass, where it happens.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 3e38)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = detect_overflow()(lambda state, x: state.model(x).mean())
        >>> try:
        ...     step(state, torch.full((1, 1), 2.0))
        ... except NonFiniteError as error:
        ...     print(error.found.partition(",")[0])
        the first infinity in the output of 0 (Linear

    Source: https://huggingface.co/docs/transformers/debugging
    """
    shown = "detect_overflow(underflow=True)" if underflow else "detect_overflow()"
    return wrap(name=shown, forward=functools.partial(Watch, underflow=underflow))
