"""Cutting a batch into micro-batches that fit into memory."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopkit.check import at_least_one
from loopkit.compose import Decorator, compose, own, wrap
from loopkit.data.order import Uneven
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
    """How many samples there are at most at a time; None for whole batches.

    And how many have been computed at a time in this process.
    """

    most: int | None = None
    fits: int = 0

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
        return in_pieces([batch], most, self.cut)


def in_pieces(batches: Iterable[Any], most: int | None, cut: Cut) -> MicroBatches:
    """The batches, those cut that have more samples."""
    pieces: list[Any] = []
    for batch in batches:
        if type(batch) is Uneven:  # of a round in which not every rank has a batch of its own
            parts, _ = in_pieces([batch.batch], most, cut)
            pieces += [attrs.evolve(batch, batch=part, missing=0) for part in parts]
        elif most is None or batch_size(batch) <= most:
            pieces.append(batch)
        else:
            pieces += cut(batch, most)
    return pieces, len(pieces)


def _samples(batch: Any) -> int:
    return batch_size(batch.batch if type(batch) is Uneven else batch)


@attrs.frozen
class WeighBySamples:
    """A layer of `forward`: a piece counts by its samples, unless the function gave a weight."""

    inner: Forward

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The step function; its loss gets a weight where there are several pieces."""
        output = self.inner(state, batch)
        whole = state.window[1] == 1 and state.ranks.size == 1  # other ranks may have cut theirs
        if whole or not torch.is_grad_enabled():  # that is, evaluated
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

    def __call__(self, state: TrainState, window: MicroBatches) -> None:
        """The gradients of the window, as if it had been cut so from the start."""
        kept = state.features[KEPT_AS]
        rng, statistics = rng_state(state.device), _statistics(state.model)
        while True:
            window = state.window = in_pieces(window[0], kept.most, self.cut)
            largest = max(window[0], key=_samples)
            # Ranks that talk in the backward pass cannot begin anew: they try a piece before
            probed = not state.ranks.alone and state.ranks.agree(_samples(largest) > kept.fits)
            failure = self._probe(state, largest) if probed else self._attempt(state, window)
            if probed and state.ranks.agree(failure is not None):
                self._halve(state, state.ranks.agree(_samples(largest)), failure)
            elif failure is None:
                kept.fits = max(kept.fits, _samples(largest))
                if not probed:
                    return
            elif state.ranks.alone:
                self._halve(state, _samples(largest), failure)
            else:
                _explain(failure, "pieces of this size fitted before; other ranks wait")
                raise failure
            _begin_anew(state, rng, statistics)

    def _probe(self, state: TrainState, piece: Any) -> Exception | None:
        """The largest piece alone: nothing that ranks do together, lest one waits for another."""
        state.window, ranks = ((piece,), 1), state.ranks
        # Shards talk in each forward anyway; and gradients that they have not summed up would stay
        with nullcontext() if ranks.shards_tensors else ranks.unsynced():
            return self._attempt(state, state.window)

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

    def _halve(self, state: TrainState, before: int, failure: Exception | None) -> None:
        if before <= 1 and failure is not None:
            _explain(failure, "one sample at a time does not fit either")
            raise failure
        most = state.features[KEPT_AS].most = max(1, -(-before // 2))
        logger.info("out of memory with {} samples at a time; going on with {}", before, most)


def _explain(failure: Exception, why: str) -> None:
    failure.add_note(f'with_microbatch("auto"): {why}')


def _begin_anew(
    state: TrainState, rng: dict[str, Any], statistics: list[tuple[Tensor, Tensor]]
) -> None:
    _free(state)
    set_rng_state(rng, state.device)
    for buffer, value in statistics:
        buffer.copy_(value)


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


def with_microbatch(n: int | str, *, cut: Cut = cut_rows) -> Decorator:
    """Compute a batch in micro-batches of at most `n` samples, with the gradient of the whole.

    Each piece counts by its samples, or by the `"weight"` that the step function returns, so
    a short last piece is no matter. `"auto"` begins with whole batches; where memory runs
    out it halves the pieces and begins the update anew, with the random numbers and BatchNorm
    statistics from before. The size that was found stays with the state, and is saved.

    What mixes samples of a batch (BatchNorm, contrastive losses) sees the pieces.

    Several ranks agree on each attempt: before pieces of a size are computed together for the
    first time, each rank tries one by itself (and waits for the others, each update). That is
    for replicas (DDP): what shards the weights talks in each forward already.

    Args:
        n: Samples of a micro-batch, or `"auto"`.
        cut: `(batch, n) -> pieces` of at most n samples, for batches whose tensors do not have
            the samples in their first dimension.

    Raises:
        UsageError: If n is neither, or for a `Window` in place of a batch.
        DataError: For a batch that cannot be cut.
        torch.OutOfMemoryError: If one sample at a time does not fit.

    Example:
        >>> with_microbatch(8), with_microbatch("auto")
        (with_microbatch(8), with_microbatch('auto'))

    Source: https://docs.mosaicml.com/projects/composer/en/stable/trainer/auto_microbatching.html
    """
    name = f"with_microbatch({n!r}{', cut=...' * (cut is not cut_rows)})"
    if n != "auto":
        if isinstance(n, str):
            raise UsageError(name, f"n = {n!r}", 'a number of samples, or "auto"')
        at_least_one(name, "n", n)
    layers: dict[str, Any] = {"forward": WeighBySamples}
    if n == "auto":
        layers["gradients"] = functools.partial(HalveUntilItFits, cut=cut)
        layers["init"] = {KEPT_AS: _make_samples}
    return compose(own(name=name, split=CutBatch(n, cut)), wrap(name=name, **layers))
