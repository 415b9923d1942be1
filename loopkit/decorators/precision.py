"""Training in one precision throughout, and in the fast formats of matrix products."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import near
from loopkit.compose import Decorator, wrap
from loopkit.errors import UsageError
from loopkit.extras import extra
from loopkit.nested import map_tensors
from loopkit.state import TrainState
from loopkit.types import Around, Forward, Output

KEPT_AS = "precision"
TRUE = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
}
MIXED = {"16-mixed": 'with_amp("fp16")', "bf16-mixed": 'with_amp("bf16")'}


@attrs.frozen
class CastModel:
    """Casts the model and what its optimizer keeps, in place, before the first update."""

    precision: str

    def __call__(self, state: TrainState) -> None:
        """Cast parameters, buffers, and the optimizer's state."""
        dtype, restored = TRUE[self.precision], state.pending.get(KEPT_AS)
        held = {p.dtype for p in state.model.parameters() if p.is_floating_point()}
        if restored is not None:
            self._check_restored(restored, held)
        state.model.to(dtype)
        optimizer: Any = state.optimizer
        if optimizer.state:  # restored: torch's own rule says what of it has the weights' dtype
            optimizer.load_state_dict(optimizer.state_dict())

    def _check_restored(self, restored: str, held: set[torch.dtype]) -> None:
        call = f"with_precision({self.precision!r})"
        if restored != self.precision:
            raise UsageError(
                call,
                f"a state that was trained with {restored!r}",
                f"with_precision({restored!r}), or load_weights into a fresh state",
            )
        if any(torch.finfo(d).bits < torch.finfo(TRUE[restored]).bits for d in held):
            raise UsageError(
                call,
                f"a state restored into {sorted(map(str, held))}, which has lost digits",
                "step.set_up(state) before it is restored, so that the model is cast first",
            )


@attrs.frozen
class CastInputs:
    """A layer of `forward`: floating tensors of the batch in the model's precision."""

    inner: Forward
    dtype: torch.dtype

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The step function, on a batch that is cast."""
        return self.inner(state, map_tensors(functools.partial(_cast, self.dtype), batch))


def _cast(dtype: torch.dtype, leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else leaf


@attrs.frozen
class TensorFloat32:
    """A layer of `around`: float32 matrix products may use TensorFloat-32, and back."""

    inner: Around

    def __call__(self, state: TrainState, last: bool) -> AbstractContextManager[None]:
        """The setting is the process's, so it is put back after each micro-batch."""
        return self._entered(state, last)

    @contextmanager
    def _entered(self, state: TrainState, last: bool) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with self.inner(state, last):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


@attrs.frozen
class ConvertToFloat8:
    """Puts torchao's float8 layers in the place of linear ones, with the same parameters."""

    recipe: str
    emulate: bool

    def __call__(self, state: TrainState) -> None:
        """Convert them in place."""
        call = 'with_precision("fp8")'
        if not self.emulate:
            _check_device(call, state.device)
        float8 = extra("torchao.float8", package="torchao", wrote=call)
        found = [m for m in state.model.children() if any(map(_fits, m.modules()))]
        if not found:
            raise UsageError(
                call,
                f"no nn.Linear inside of {type(state.model).__name__} with sizes that 16 divides",
                "linear layers of such sizes within the model",
            )
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        config = dataclasses.replace(config, emulate=self.emulate)
        float8.convert_to_float8_training(
            state.model, module_filter_fn=lambda module, _: _fits(module), config=config
        )


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not (
        module.in_features % 16 + module.out_features % 16
    )


def _check_device(call: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = str(device)
        if device.type == "cuda":
            found += " of compute capability {}.{}".format(
                *torch.cuda.get_device_capability(device)
            )
        raise UsageError(
            call,
            f"a model on {found}, which has no float8 matrix products",
            'a CUDA device of compute capability 8.9 or more; with_amp("bf16") elsewhere',
        )


def with_precision(
    precision: str, *, recipe: str = "tensorwise", emulate: bool = False
) -> Decorator:
    """Train in one precision throughout, or with faster matrix products.

    - `"64-true"`, `"32-true"`, `"16-true"`, `"bf16-true"`: the model is cast in place before
      the first update, with it the optimizer's state, and each batch's floating tensors. There
      is no loss scale: what `"16-true"` computes below 6e-8 is zero, Adam's `eps=1e-8` too
      (take 1e-4). Put it on the eval step as well.
    - `"tf32"`: float32 matrix products in TensorFloat-32, where the device has it.
    - `"fp8"`: linear layers compute in float8, by torchao, on CUDA from compute capability
      8.9 on; with `with_amp("bf16")` or `"bf16-true"` beside it, and `with_compile`.

    Mixed precision, with weights in float32, is `with_amp`.

    Args:
        precision: One of these.
        recipe: For `"fp8"`, torchao's: `"tensorwise"`, `"rowwise"`, `"rowwise_with_gw_hp"`.
        emulate: For `"fp8"`, compute what it would on any device, slowly.

    Raises:
        UsageError: For another name; for `"fp8"` where the device has none; for a state
            restored in less precision before it was cast.
        MissingExtraError: For `"fp8"` without torchao.

    Example:
        >>> with_precision("bf16-true")
        with_precision('bf16-true')

    Source: https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html, torchao.float8
    """
    name = f"with_precision({precision!r})"
    if precision in TRUE:
        return wrap(
            name=name,
            claims=("precision",),
            prepare=CastModel(precision),
            init={KEPT_AS: functools.partial(_name_of, precision=precision)},
            forward=functools.partial(CastInputs, dtype=TRUE[precision]),
        )
    if precision == "tf32":
        return wrap(name=name, claims=("float32 matrix products",), around=TensorFloat32)
    if precision == "fp8":
        return wrap(name=name, claims=("float8",), prepare=ConvertToFloat8(recipe, bool(emulate)))
    remedy = MIXED.get(precision) or near(str(precision), [*TRUE, *MIXED, "tf32", "fp8"])
    raise UsageError(name, f"precision = {precision!r:.40}", remedy)


def _name_of(state: TrainState, precision: str) -> str:  # noqa: ARG001
    return precision
