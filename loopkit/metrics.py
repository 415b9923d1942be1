"""What `evaluate` measures with: torchmetrics, collections of them, and plain functions."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.errors import UsageError
from loopkit.ranks import Ranks, together

ARGUMENTS = ("preds", "target")
MOST_WAITING, MOST_ELEMENTS = 16, 2**18  # batches that wait for one update, and what they may hold


@attrs.define
class Meter:
    """One metric with the keys of the step's mapping that it reads.

    An update of a torchmetric takes as long as a small model. Where several batches together
    leave the very same state as one after the other, they are gathered for one update.

    Attributes:
        name: What it is reported as; empty for a collection, whose metrics have names.
        metric: A torchmetrics Metric or MetricCollection, or a function.
        keys: What it is called with.
    """

    name: str
    metric: Any
    keys: tuple[str, ...]
    _kept: list[tuple[Any, ...]] = attrs.field(factory=list)
    _shapes: list[Any] = attrs.field(factory=list)
    _elements: int = 0
    _updated: bool = False

    @property
    def is_function(self) -> bool:
        """Whether it needs everything at once; a torchmetric gathers its state batch by batch."""
        return not hasattr(self.metric, "update")

    def start(self, device: torch.device) -> None:
        """Forget what was gathered before, and move to the device."""
        self._kept.clear()
        self._shapes, self._elements = [], 0
        self._updated = False
        if not self.is_function:
            self.metric.to(device).reset()

    def update(self, output: Mapping[str, Any]) -> None:
        """Gather one batch."""
        if missing := [key for key in self.keys if key not in output]:
            raise UsageError(
                f"evaluate(..., metrics={{{self.name!r}: ...}})",
                f"no {missing} in what the step function returned, which has {sorted(output)}",
                'an eval step that returns {"preds": ..., "target": ...}, or the keys beside the'
                ' metric: {"depth": (metric, "depth", "depth_target")}',
            )
        values = tuple(output[key] for key in self.keys)
        if self.is_function:
            self._kept.append(values)
        else:
            self._wait(values)
        self._updated = True

    def _wait(self, values: tuple[Any, ...]) -> None:
        shapes = [_kind_of(value) for value in values]
        if shapes != self._shapes:
            self._give()
            self.metric.update(*values)  # the first alone: what it cannot take, it says at once
            self._shapes = shapes if None not in shapes and _is_additive(self.metric) else []
            return
        self._kept.append(values)
        self._elements += sum(value.numel() for value in values)
        if len(self._kept) == MOST_WAITING or self._elements > MOST_ELEMENTS:
            self._give()

    def _give(self) -> None:
        if self._kept:
            self.metric.update(*(torch.cat(column) for column in zip(*self._kept, strict=True)))
            self._kept.clear()
            self._elements = 0

    def results(self, ranks: Ranks) -> list[tuple[str, float]]:
        """What it found on all ranks, as named numbers, equal on all."""
        if self.is_function:
            return self._of_function(ranks)
        self._give()
        with ranks.among(self._updated) as group, _synced(self.metric, group, ranks):
            found = [*numbers(self.name, self.metric.compute())] if self._updated else []
        return ranks.from_first(found)  # type: ignore[no-any-return]

    def _of_function(self, ranks: Ranks) -> list[tuple[str, float]]:
        everywhere = ranks.gather([tuple(map(_on_host, values)) for values in self._kept])
        self._kept.clear()
        rounds = itertools.zip_longest(*everywhere)  # the order of the data: rank by rank
        columns = zip(*(v for row in rounds for v in row if v is not None), strict=True)
        found: list[tuple[str, float]] = together(
            ranks, f"the metric {self.name!r}",
            lambda: [*numbers(self.name, self.metric(*map(_joined, columns)))],
        )  # fmt: skip
        return found


@contextmanager
def _synced(metric: Any, group: Any, ranks: Ranks) -> Iterator[None]:
    """Torchmetrics adds up over all processes that there are; let it do so over the state's."""
    parts = [part for part in metric.modules() if hasattr(part, "process_group")]
    before = [(part.process_group, part._to_sync) for part in parts]  # noqa: SLF001
    for part in parts:
        part.process_group, part._to_sync = group, ranks.size > 1  # noqa: SLF001
    try:
        yield
    finally:
        for part, (own, syncs) in zip(parts, before, strict=True):
            part.process_group, part._to_sync = own, syncs  # noqa: SLF001


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _kind_of(value: Any) -> Any:
    """What tensors must share to be joined; None where it is none with a dimension."""
    return (value.shape[1:], value.dtype) if isinstance(value, Tensor) and value.ndim else None


def _is_additive(metric: Any) -> bool:
    """Whether joined batches leave the very state that they leave one by one.

    Known of torchmetrics' multiclass metrics that take the largest logit and count in integers.
    Others don't: sums of floats round by their order, wrappers may look at each batch, and binary
    metrics and curves look at each batch for whether it holds logits or probabilities.
    """
    if hasattr(metric, "items"):  # a collection
        return all(map(_is_additive, metric.values()))
    kind = type(metric)
    if not kind.__module__.startswith("torchmetrics.classification."):
        return False
    if not kind.__name__.startswith("Multiclass") or hasattr(metric, "thresholds"):
        return False
    return bool(metric.metric_state) and all(
        isinstance(state, Tensor) and not state.is_floating_point()
        for state in metric.metric_state.values()
    )


def _joined(column: tuple[Any, ...]) -> Any:
    if isinstance(column[0], Tensor):
        return torch.cat([value if value.ndim else value[None] for value in column])
    return [item for value in column for item in value]


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """A result as named numbers: mappings, sequences and arrays are spelled out with slashes.

    Example:
        >>> dict(numbers("f1", torch.tensor([0.5, 1.0])))
        {'f1/0': 0.5, 'f1/1': 1.0}
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(f"{name}/{key}" if name else str(key), item)
    elif isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0:
        for i, item in enumerate(value):
            yield from numbers(f"{name}/{i}", item)
    else:
        yield name, float(value)


def meters(metrics: Any) -> list[Meter]:
    """The meters for what the user gave as `metrics`.

    Raises:
        UsageError: For what is neither a torchmetric, a function, nor a mapping of those.
    """
    if metrics is None:
        return []
    if hasattr(metrics, "update") and hasattr(metrics, "compute") and not isinstance(metrics, type):
        is_collection = isinstance(metrics.compute, Callable) and hasattr(metrics, "items")  # type: ignore[arg-type]
        return [Meter("" if is_collection else type(metrics).__name__, metrics, ARGUMENTS)]
    if isinstance(metrics, Mapping):
        return [_meter(str(name), metric) for name, metric in metrics.items()]
    raise UsageError(
        f"evaluate(..., metrics={metrics!r:.60})",
        f"a {type(metrics).__name__}",
        'a torchmetrics Metric or MetricCollection, or {"accuracy": MulticlassAccuracy(10)}',
    )


def _meter(name: str, given: Any) -> Meter:
    metric, keys = (
        (given[0], given[1:]) if isinstance(given, tuple) and given else (given, ARGUMENTS)
    )
    measures = (callable(metric) or hasattr(metric, "update")) and not isinstance(metric, type)
    if not measures or not keys or not all(isinstance(key, str) for key in keys):
        raise UsageError(
            f"evaluate(..., metrics={{{name!r}: {given!r:.60}}})",
            f"a {type(given).__name__}",
            "a torchmetric, a function (preds, target) -> number, or a tuple (metric, key, ...)",
        )
    return Meter(name, metric, tuple(keys))
