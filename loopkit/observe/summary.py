"""A model as a table: layers, shapes, parameters, FLOPs."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopkit.errors import UsageError
from loopkit.modes import eval_modes, untouched_rng
from loopkit.nested import leaves_of
from loopkit.observe.display import amount
from loopkit.observe.flops import flop_counter
from loopkit.state import TrainState

WIDE = 34  # characters of a layer's name and type


@attrs.frozen
class Row:
    """A layer.

    Attributes:
        name: As `named_modules` gives it; empty for the model.
        kind: Its class.
        shape: Of its output, or of the first tensor in it; None where it did not run.
        parameters: How many numbers, with those of its own layers; shared ones once.
        trainable: How many of them are trained.
        flops: Of one forward pass; None without a batch.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    trainable: int
    flops: int | None

    @property
    def depth(self) -> int:
        """How deep it lies in the model; 0 for the model."""
        return self.name.count(".") + bool(self.name)


@attrs.frozen(repr=False)
class Summary:
    """What `summary` found; `print` it.

    Attributes:
        rows: A row for each layer, the model first.
        bytes: Of the parameters and buffers.
        depth: How deep the printed table goes.
    """

    rows: tuple[Row, ...]
    bytes: int
    depth: int

    @property
    def parameters(self) -> int:
        """Numbers in the parameters of the model."""
        return self.rows[0].parameters

    @property
    def trainable(self) -> int:
        """Those of them that are trained."""
        return self.rows[0].trainable

    @property
    def flops(self) -> int | None:
        """FLOPs of one forward pass of the batch; None without a batch."""
        return self.rows[0].flops

    def __repr__(self) -> str:
        shown = [row for row in self.rows if row.depth <= self.depth]
        shapes = [_shape(row) for row in shown]
        wide = max(map(len, [*shapes, "output shape"]))
        lines = [f"{'layer':<{WIDE}}  {'output shape':<{wide}}  {'parameters':>12}  {'FLOPs':>7}"]
        lines.append("-" * len(lines[0]))
        for row, shape in zip(shown, shapes, strict=True):
            name = "  " * row.depth + (row.name.rpartition(".")[2] or "")
            label = f"{name} {row.kind}".strip() if not row.name else f"{name} ({row.kind})"
            label = label if len(label) <= WIDE else label[: WIDE - 1] + "…"
            flops = amount(row.flops) if row.flops else "-"
            lines.append(
                f"{label:<{WIDE}}  {shape:<{wide}}  {_count(row):>12}  {flops:>7}".rstrip()
            )
        return "\n".join([*lines, lines[1], self._total()])

    def _total(self) -> str:
        parts = [f"{self.parameters:,} parameters, {self.trainable:,} trained"]
        parts.append(f"{self.bytes / 2**20:,.1f} MiB")
        if self.flops is not None:
            parts.append(f"{amount(self.flops)} FLOPs forward")
        if any(row.parameters and not row.trainable for row in self.rows):
            parts.append("* not trained")
        return "; ".join(parts)


def _shape(row: Row) -> str:
    return "-" if row.shape is None else "x".join(map(str, row.shape)) or "scalar"


def _count(row: Row) -> str:
    frozen = "*" if row.parameters and not row.trainable else ""
    return f"{row.parameters:,}{frozen}" if row.parameters else "-"


def summary(model: nn.Module | TrainState, batch: Any = None, *, depth: int = 3) -> Summary:
    """The layers of a model, with output shapes, parameters and FLOPs, as a table to print.

    The model runs once on the batch, in eval mode and without gradients; modes, gradients,
    buffers and random numbers are as before. FLOPs are counted by torch: a multiplication and
    an addition are two, and only matrix products, convolutions and attention count.

    Args:
        model: The model, or a state that holds it.
        batch: What the model takes: a tensor, a tuple of arguments, or a mapping of named ones;
            on the model's device. Without it there are no shapes and no FLOPs.
        depth: How deep the printed table goes; `.rows` has all layers.

    Returns:
        A value with `.rows`, `.parameters`, `.trainable` and `.flops`.

    Raises:
        UsageError: If it is no module, or its parameters have no shapes yet.

    Example:
        >>> print(summary(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4)))
        layer                               output shape    parameters    FLOPs
        -----------------------------------------------------------------------
        Sequential                          2x8                     40      128
          0 (Linear)                        2x8                     40      128
          1 (ReLU)                          2x8                      -        -
        -----------------------------------------------------------------------
        40 parameters, 40 trained; 0.0 MiB; 128 FLOPs forward

    Source: torch.utils.flop_counter
    """
    if hasattr(batch, "batch_sampler") or isinstance(batch, Iterator):
        raise UsageError(
            "summary(model, batch)",
            f"a {type(batch).__name__}, which gives batches",
            "what the model takes: inputs, _ = next(iter(loader)); summary(model, inputs)",
        )
    state = model if isinstance(model, TrainState) else TrainState(model)
    root = state.model
    if lazy := [name for name, p in root.named_parameters() if is_lazy(p)]:
        raise UsageError(
            "summary(model, batch)",
            f"parameters without a shape yet: {', '.join(lazy[:3])}",
            "the model called once on a batch before: model(inputs)",
        )
    shapes, flops = ({}, None) if batch is None else _run(state, batch)
    rows = tuple(_row(name, module, shapes, flops) for name, module in root.named_modules())
    tensors = [*root.parameters(), *root.buffers()]
    return Summary(rows, sum(t.numel() * t.element_size() for t in tensors), depth)


def _row(
    name: str, module: nn.Module, shapes: Mapping[str, Any], flops: Mapping[str, int] | None
) -> Row:
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return Row(
        name,
        type(module).__name__,
        shapes.get(name),
        sum(n for n, _ in counts),
        sum(n for n, trained in counts if trained),
        None if flops is None else flops.get(name, 0),
    )


def _run(state: TrainState, batch: Any) -> tuple[dict[str, tuple[int, ...] | None], dict[str, int]]:
    model, shapes = state.model, dict[str, tuple[int, ...] | None]()
    counter = flop_counter()
    with (
        eval_modes(state),
        untouched_rng(state.device),
        torch.no_grad(),
        _shapes_noted(model, shapes),
        _layers_called_singly(),
        counter,
    ):
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, tuple | list) else model(batch)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__  # what the counter calls the model; a layer is `Root.0.weight`
    whole = counter.get_total_flops()
    return shapes, {k.removeprefix(f"{root}."): v for k, v in counts.items()} | {"": whole}


@contextlib.contextmanager
def _layers_called_singly() -> Iterator[None]:
    """Attention in eval mode skips its layers for one operation that the counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _shapes_noted(model: nn.Module, shapes: dict[str, tuple[int, ...] | None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(Note(name, shapes)) for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@attrs.frozen(eq=False)
class Note:
    """A hook that notes the shape of a layer's output."""

    name: str
    shapes: dict[str, tuple[int, ...] | None]

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        """Note it."""
        first = next((leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)), None)
        self.shapes[self.name] = None if first is None else tuple(first.shape)
