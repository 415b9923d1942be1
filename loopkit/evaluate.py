"""Evaluation: the same figures whatever the batch size."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.compose import eval_step
from loopkit.data.order import Uneven
from loopkit.device import prefetch
from loopkit.errors import OutputError, Preempted, UsageError
from loopkit.feed import counted, reading
from loopkit.given import check_data
from loopkit.limits import batch_limit, empty, known_length
from loopkit.metrics import Meter, meters
from loopkit.modes import eval_modes, untouched_rng
from loopkit.nested import batch_size
from loopkit.outcome import Scalar, Weight
from loopkit.output import read_weight, scalars_of
from loopkit.ranks import Ranks
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction

Context = Callable[[], AbstractContextManager[Any]]


@attrs.define
class Mean:
    """A weighted mean that is summed on the device, in float64 where it has that."""

    total: Tensor | float = 0.0
    weight: Weight = 0.0

    def add(self, value: Scalar, weight: Weight) -> None:
        """Add one batch; one of weight zero, a mean over nothing, adds nothing."""
        number = _wide(value) if isinstance(value, Tensor) else float(value)
        if isinstance(weight, Tensor):
            self.total = self.total + torch.where(weight > 0, number * _wide(weight), 0)
        elif weight:
            self.total = self.total + number * weight
        self.weight = self.weight + weight

    def value(self) -> float:
        """The mean; NaN over nothing."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def evaluate(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any] | Mapping[str, Iterable[Any]],
    metrics: Any = None,
    *,
    limit_batches: float | None = None,
    inference_mode: bool = True,
) -> dict[str, float]:
    """Evaluate the state on the data: mean losses and metrics, as floats.

    The step function returns a mapping (or a loss). Its numbers and 0-d tensors become means,
    weighted by its `"weight"`, or else by the number of samples in the batch, so that the
    figures do not depend on the batch size. `preds` and `target` go to the metrics; what else
    is a vector or more is no score (`accuracies.mean()` is one). A NaN in one batch is a NaN in
    the result. Train and eval modes of all modules, and the random number generators, are left
    as they were.

    Args:
        step: An eval step, or a plain function; only its forward runs.
        state: What is evaluated.
        data: Batches, or several named: `{"val": loader, "test": loader}`; then the names
            of the results start with theirs: `val/loss`.
        metrics: A torchmetrics Metric or MetricCollection, or a mapping from names to those
            or to functions `(preds, target) -> number`, which are called once, with everything,
            on the CPU (scikit-learn's take the target first). A tuple says what a metric reads:
            `{"depth": (metric, "depth", "depth_target")}`.
        limit_batches: A number of batches, or a fraction of a sized loader; over all ranks, so
            that the figures do not depend on how many those are.
        inference_mode: `torch.inference_mode`, else `torch.no_grad`.

    Returns:
        Name to float; a result that is no scalar is spelled out, `f1/0`, `f1/1`.

    Raises:
        UsageError: For metrics or limits that cannot be right.
        OutputError: If the step function returns neither a mapping nor a 0-d loss.
        DataError: For empty data.
        Preempted: In a run that is `preemptible`, if it is asked to stop; its state is saved.

    Example:
        >>> state = TrainState(torch.nn.Linear(1, 1))
        >>> evaluate(lambda state, x: {"loss": x.mean()}, state, [torch.ones(3), torch.zeros(1)])
        {'loss': 0.75}
    """
    if not isinstance(state, TrainState):
        raise UsageError(
            "evaluate(step, state, data)",
            f"a {type(state).__name__} as the state",
            "lk.TrainState(model) second, and the data third",
        )
    lifted, measures = eval_step(step), meters(metrics)
    named = data if isinstance(data, Mapping) else {"": data}
    if not named:
        raise empty(data, "no loader in it")
    scores: dict[str, float] = {}
    kept = untouched_rng(state.device, named.values())
    try:
        with kept, eval_modes(state), state.ranks.evaluating(state.model):
            for name, loader in named.items():
                check_data("evaluate(step, state, data)", loader)
                context = _gradless(inference_mode)
                outputs = outputs_of(lifted, state, loader, limit_batches, context)
                found = _measure(outputs, measures, state)
                scores |= {f"{name}/{key}" if name else key: value for key, value in found.items()}
    except Preempted:
        if state.preemption is not None:
            state.preemption.save()  # only now are modes and random numbers those of the training
        raise
    return scores


def _gradless(inference_mode: bool) -> Context:
    return torch.inference_mode if inference_mode else torch.no_grad


def outputs_of(
    step: Step,
    state: TrainState,
    data: Iterable[Any],
    limit_batches: float | None,
    context: Context,
) -> Iterator[tuple[Any, Any, bool]]:
    """Each batch, what the step function made of it, and whether it only fills a round.

    The step function runs within a context of its own.

    Raises:
        UsageError: At once, for a limit that cannot be right.
    """
    limit = batch_limit(data, limit_batches)
    part = state.ranks.share_once(data, limit_batches)
    if part is not data:  # it ends at the limit, which is one of the batches of all ranks
        data, limit = part, known_length(part)
    if known_length(data) is None or limit is None:
        take = functools.partial(_first, limit=limit)
    else:
        take = functools.partial(counted, length=limit, whole=limit_batches is None)
    return _outputs(step, state, data, take, context)


def _first(batches: Iterator[Any], limit: int | None) -> Iterator[Any]:
    return itertools.islice(batches, limit)


def _outputs(
    step: Step,
    state: TrainState,
    data: Iterable[Any],
    take: Callable[[Iterator[Any]], Iterator[Any]],
    context: Context,
) -> Iterator[tuple[Any, Any, bool]]:
    some = False
    with reading(data) as batches:
        for batch in prefetch(take(batches), state.device):
            some, filler = True, False
            if type(batch) is Uneven:
                batch, filler = batch.batch, batch.filler  # noqa: PLW2901
            with context(), step.around(state, True):
                output = state.ranks.forward(step.forward, state, batch)
            yield batch, output, filler
            if state.preemption is not None:  # on all ranks alike, after each round
                state.preemption.poll()
    if not some:
        raise empty(data, "no batch to evaluate")


def _measure(
    outputs: Iterator[tuple[Any, Any, bool]], measures: list[Meter], state: TrainState
) -> dict[str, float]:
    means: dict[str, Mean] = {}
    for meter in measures:
        meter.start(state.device)
    for batch, output, filler in outputs:
        if filler:
            continue
        mapping = _mapping_of(output)
        weight = mapping.get("weight")
        _add_means(means, mapping, batch_size(batch) if weight is None else read_weight(weight))
        for meter in measures:
            meter.update(mapping)
    scores = {name: mean.value() for name, mean in _over_ranks(means, state.ranks).items()}
    for meter in measures:
        for name, number in meter.results(state.ranks):
            if name in scores:
                raise UsageError(
                    f"evaluate(..., metrics={{{name!r}: ...}})",
                    f"a result {name!r} twice, also from the step function or another metric",
                    "another name for one of them",
                )
            scores[name] = number
    return scores


def _over_ranks(means: dict[str, Mean], ranks: Ranks) -> dict[str, Mean]:
    """The means over what all ranks have seen; in one exchange, in the order of ranks."""
    if ranks.size == 1:
        return means
    mine = {name: (float(mean.total), float(mean.weight)) for name, mean in means.items()}
    found: dict[str, Mean] = {}
    for theirs in ranks.gather(mine):
        for name, (total, weight) in theirs.items():
            mean = found.setdefault(name, Mean())
            mean.total, mean.weight = mean.total + total, mean.weight + weight
    return found


def _mapping_of(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return output
    if isinstance(output, Tensor) and output.ndim == 0:
        return {"loss": output}
    raise OutputError(
        "an eval step's return",
        f"a {type(output).__name__}"
        + (f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""),
        'a 0-d loss, or a mapping: {"loss": ..., "preds": ..., "target": ...}',
    )


def _add_means(means: dict[str, Mean], mapping: Mapping[str, Any], weight: Weight) -> None:
    numbers = scalars_of(mapping)
    if "loss" in mapping:
        numbers = {"loss": _checked_loss(mapping["loss"]), **numbers}
    for name, value in numbers.items():
        means.setdefault(name, Mean()).add(value, weight)


def _checked_loss(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and not loss.ndim:
        return loss
    raise OutputError(
        'an eval step\'s "loss"',
        f"a {type(loss).__name__} of shape {tuple(getattr(loss, 'shape', ()))}",
        "a 0-d tensor, the mean over the batch",
    )
