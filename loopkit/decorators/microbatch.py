"""Cutting a batch into micro-batches that fit into memory."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopkit.check import at_least_one
from loopkit.compose import Decorator, compose, own, wrap
from loopkit.errors import UsageError
from loopkit.nested import batch_size, rows_of
from loopkit.rng import rng_state, set_rng_state
from loopkit.state import TrainState
from loopkit.types import Forward, GradientsOf, Output
from loopkit.window import MicroBatches, Window

KEPT_AS = "microbatch"
MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@attrs.define
class Samples:
    """How many samples fit at a time, as far as is known; None for whole batches."""

    most: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The size that was found."""
        return {"most": self.most}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.most = state_dict["most"]


def cut_rows(batch: Any, most: int) -> list[Any]:
    """The batch in pieces of at most that many samples, without copying its tensors."""
    total = batch_size(batch)
    return [rows_of(batch, i, min(i + most, total), total) for i in range(0, total, most)]


Cut = Callable[[Any, int], Iterable[Any]]


@attrs.frozen
class CutBatch:
    """The owner of `split`: a batch becomes micro-batches of at most so many samples."""

    n: int | str
    cut: Cut

    def __call__(self, state: TrainState, batch: Any) -> MicroBatches:
        """The pieces, and how many they are."""
        if isinstance(batch, Window):
            raise UsageError(
                f"with_microbatch({self.n!r}) on a Window",
                f"a window of {batch.length} micro-batches, which is cut already",
                "a bare batch; or with_grad_accum for windows",
            )
        most = self.n if isinstance(self.n, int) else state.features[KEPT_AS].most
        if most is None or batch_size(batch) <= most:
            return (batch,), 1
        pieces = [*self.cut(batch, most)]
        return pieces, len(pieces)


@attrs.frozen
class WeighBySamples:
    """A layer of `forward`: a piece counts by its samples, unless the function gave a weight."""

    inner: Forward

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The step function; its loss gets a weight where there are several pieces."""
        output = self.inner(state, batch)
        if state.window[1] == 1 or not torch.is_grad_enabled():  # not cut, or evaluated
            return output
        if isinstance(output, Tensor):
            return {"loss": output, "weight": batch_size(batch)}
        if isinstance(output, Mapping) and output.get("weight") is None:
            return {**output, "weight": batch_size(batch)}
        return output


@attrs.frozen
class HalveUntilItFits:
    """A layer of `gradients`: where memory runs out the pieces are halved, and it begins anew."""

    inner: GradientsOf
    cut: Cut
    agree: Callable[[bool], bool]

    def __call__(self, state: TrainState, window: MicroBatches) -> None:
        """The gradients of the window, as if it had been cut so from the start."""
        window = state.window = self._cut(window[0], state.features[KEPT_AS].most)
        rng, statistics = rng_state(state.device), _statistics(state.model)
        while True:
            failure = self._attempt(state, window)
            if not self.agree(failure is not None):
                return
            window = state.window = self._halved(state, window, failure)
            set_rng_state(rng, state.device)
            for buffer, value in statistics:
                buffer.copy_(value)

    def _attempt(self, state: TrainState, window: MicroBatches) -> Exception | None:
        try:
            self.inner(state, window)
        except RuntimeError as error:  # OutOfMemoryError is one; not all devices have it
            if not isinstance(error, torch.OutOfMemoryError) and not any(
                message in str(error) for message in MEMORY_MESSAGES
            ):
                raise
            return error.with_traceback(None)  # whose frames hold the activations
        return None

    def _halved(
        self, state: TrainState, window: MicroBatches, failure: Exception | None
    ) -> MicroBatches:
        before = max(map(batch_size, window[0]))
        if before <= 1 and failure is not None:
            failure.add_note('with_microbatch("auto"): one sample at a time does not fit either')
            raise failure
        most = state.features[KEPT_AS].most = -(-before // 2)
        logger.info("out of memory with {} samples at a time; going on with {}", before, most)
        _free(state)
        return self._cut(window[0], most)

    def _cut(self, pieces: Iterable[Any], most: int | None) -> MicroBatches:
        kept = [*pieces]
        if most is not None and max(map(batch_size, kept)) > most:
            kept = [part for piece in kept for part in self.cut(piece, most)]
        return kept, len(kept)


def _free(state: TrainState) -> None:
    state.graph = state.output = None
    for parameter in state.parameters():
        parameter.grad = None
    if state.device.type != "cpu":
        torch.get_device_module(state.device).empty_cache()


def _statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    return [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]


def _make_samples(state: TrainState) -> Samples:  # noqa: ARG001
    return Samples()


def with_microbatch(
    n: int | str, *, cut: Cut = cut_rows, agree: Callable[[bool], bool] = bool
) -> Decorator:
    """Compute a batch in micro-batches of at most `n` samples, with the gradient of the whole.

    Each piece counts by its samples, or by the `"weight"` that the step function returns, so
    a short last piece is no matter. `"auto"` begins with whole batches; where memory runs
    out it halves the pieces and begins the update anew, with the random numbers and BatchNorm
    statistics from before. The size that was found stays with the state, and is saved.

    What mixes samples of a batch (BatchNorm, contrastive losses) sees the pieces.

    Args:
        n: Samples of a micro-batch, or `"auto"`.
        cut: `(batch, n) -> pieces` of at most n samples, for batches whose tensors do not have
            the samples in their first dimension.
        agree: With several ranks: takes whether memory ran out here, returns whether it did on
            any. It is called once after each attempt.

    Raises:
        UsageError: If n is neither, or for a `Window` in place of a batch.
        DataError: For a batch that cannot be cut.
        torch.OutOfMemoryError: If one sample at a time does not fit.

    Example:
        >>> with_microbatch(8), with_microbatch("auto")
        (with_microbatch(8), with_microbatch('auto'))

    Source: https://docs.mosaicml.com/projects/composer/en/stable/trainer/auto_microbatching.html
    """
    settings = ", cut=..." * (cut is not cut_rows) + ", agree=..." * (agree is not bool)
    name = f"with_microbatch({n!r}{settings})"
    if n != "auto":
        if isinstance(n, str):
            raise UsageError(name, f"n = {n!r}", 'a number of samples, or "auto"')
        at_least_one(name, "n", n)
    layers: dict[str, Any] = {"forward": WeighBySamples}
    if n == "auto":
        layers["gradients"] = functools.partial(HalveUntilItFits, cut=cut, agree=agree)
        layers["init"] = {KEPT_AS: _make_samples}
    return compose(own(name=name, split=CutBatch(n, cut)), wrap(name=name, **layers))
