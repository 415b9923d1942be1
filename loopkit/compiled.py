"""The owners of a step's places that compile the whole update; see `with_compile`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from loopkit.errors import CompositionError
from loopkit.functional import Form, Group, functional_form
from loopkit.graphs import Program, allow_backward
from loopkit.nested import batch_size
from loopkit.outcome import on_device
from loopkit.output import read_output, shared
from loopkit.places import apply_update, check_count
from loopkit.state import TrainState
from loopkit.types import Recompute
from loopkit.window import MicroBatches

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that make CUDA graphs


@attrs.frozen
class TracedBackward:
    """The owner of `backward` for the scope "step": in a graph, as a function of the weights."""

    def __call__(self, state: TrainState, loss: Tensor) -> None:
        """The backward pass."""
        if not torch.compiler.is_compiling():
            torch.autograd.backward(loss)
            return
        parameters = [p for p in state.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                held = parameter.grad
                parameter.grad = gradient if held is None else held + gradient


@attrs.frozen
class Optimized:
    """What stands for the optimizer while dynamo traces a step: its groups, and no more.

    Dynamo guards every value of an optimizer's groups, so that a schedule would have each
    update compiled again; of a plain object it guards what is read.
    """

    param_groups: list[dict[str, Any]]


@contextmanager
def _as_groups(state: TrainState) -> Iterator[None]:
    optimizer: Any = state.optimizer
    state.optimizer = Optimized(optimizer.param_groups)  # type: ignore[assignment]
    try:
        yield
    finally:
        state.optimizer = optimizer


def _named_first(state: TrainState) -> None:
    """Dynamo has to meet each weight under one name first, or it loses gradients set under it."""
    for parameter in state.parameters():
        _ = parameter.grad


def _micro_batch(parts: Any, state: TrainState, batch: Any, count: int | None) -> Any:
    """Forward and backward of one micro-batch; to be traced."""
    allow_backward()
    _named_first(state)
    loss, weight, scalars, output = read_output(parts.forward(state, batch))
    share = shared(loss, weight, count)
    if share is not None:
        parts.backward(state, share)
    if output is not None:  # without the graph, which the backward pass has used up
        output = {k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items()}
    return (loss.detach(), weight, scalars), output, share is not None


def _finish(parts: Any, state: TrainState) -> Tensor | None:
    """What lies between the gradients and the optimizer; to be traced."""
    allow_backward()
    _named_first(state)
    parts.unscale(state)
    parts.transform(state)
    verdict: Tensor | None = parts.verdict(state)
    return verdict


def _update_weights(form: Form, groups: list[Group], verdict: Tensor | None) -> Tensor | None:
    """The optimizer's update; to be traced."""
    allow_backward()
    return form.update(groups, verdict)


def _finish_and_update(parts: Any, state: TrainState, form: Form, groups: list[Group]) -> Any:
    """From the gradients to the new weights; to be traced."""
    verdict = _finish(parts, state)
    return verdict, form.update(groups, verdict)


def _whole(parts: Any, state: TrainState, batch: Any, form: Form, groups: list[Group]) -> Any:
    """From the batch to the new weights; to be traced."""
    part, output, reached = _micro_batch(parts.gradients.parts, state, batch, 1)
    state.outcome.parts.append(part)
    if not reached:
        state.skip_if(True)
    verdict, applied = _finish_and_update(parts, state, form, groups)
    for parameter in state.parameters():
        parameter.grad = None  # they need not leave the graph
    return output, verdict, applied


def _programs(name: str, settings: Mapping[str, Any], *functions: Callable[..., Any]) -> Any:
    return {f.__name__: Program(name, f, settings) for f in functions}


@attrs.frozen
class CompiledGradients:
    """The owner of `gradients` for the scope "step": a graph for each micro-batch."""

    parts: Any
    name: str
    settings: Mapping[str, Any]
    program: Program = attrs.field(init=False, eq=False)

    @program.default
    def _made(self) -> Program:
        return Program(self.name, _micro_batch, self.settings)

    def __call__(self, state: TrainState, window: MicroBatches) -> None:
        """Leave the sum of the micro-batches' gradients, each with its share."""
        micro_batches, count = window
        outcome, reached = state.begin_update(count), False
        for batch in micro_batches:
            last = len(outcome.parts) + 1 == count or (
                count is None and micro_batches.at_end  # type: ignore[attr-defined]
            )
            with self.parts.around(state, last), _as_groups(state):
                part, state.output, reaches = self.program(self.parts, state, batch, count)
            outcome.parts.append(part)
            outcome.samples += batch_size(batch)
            reached = reached or reaches
        check_count(len(outcome.parts), count)
        if not reached:
            state.skip_if(True)


@attrs.frozen
class Known:
    """What a window's outcome answers, computed before.

    A graph that looked at each micro-batch's weight would be another for each number of them.
    """

    loss: Tensor
    weight: Tensor | None
    empty: bool
    length: int = 0

    def mean(self) -> Tensor:
        """See `Outcome.mean`."""
        return self.loss

    def divisor(self) -> Tensor | None:
        """See `Outcome.divisor`."""
        return self.weight

    def is_empty(self) -> bool:
        """See `Outcome.is_empty`."""
        return self.empty


def _known(state: TrainState) -> Any:
    outcome = state.outcome
    divisor = outcome.divisor()
    if divisor is not None and not isinstance(divisor, Tensor):
        wide = torch.get_default_dtype() if isinstance(divisor, float) else torch.int64
        divisor = on_device(divisor, wide, state.device)
    return Known(outcome.mean(), divisor, outcome.is_empty())


@attrs.frozen
class CompiledApply:
    """The owner of `apply` for the scope "step": the optimizer's functional form as a graph."""

    name: str
    settings: Mapping[str, Any]
    program: Program = attrs.field(init=False, eq=False)
    _forms: dict[int, tuple[Any, Form | None]] = attrs.field(init=False, eq=False, factory=dict)

    @program.default
    def _made(self) -> Program:
        return Program(self.name, _update_weights, self.settings)

    def __reduce__(self) -> Any:  # graphs do not pickle; they are made again
        return CompiledApply, (self.name, self.settings)

    def form(self, optimizer: Any) -> Form | None:
        """The functional form of the optimizer, made once."""
        held = self._forms.get(id(optimizer))
        if held is None or held[0] is not optimizer:
            graphs = self.settings.get("mode") in CUDA_GRAPHS
            form = functional_form(optimizer, in_graphs=graphs)
            held = self._forms[id(optimizer)] = optimizer, form
        return held[1]

    def __call__(self, state: TrainState, recompute: Recompute) -> bool | Tensor:
        """Update the weights; by the optimizer's own step where it has no other form."""
        form = self.form(state.optimizer)
        groups = form and form.bind(state.optimizer)  # type: ignore[arg-type]
        if not groups or form is None:
            return apply_update(state, recompute)
        applied = self.program(form, groups, state.verdict)
        return True if applied is None else applied


@attrs.frozen
class CompiledUpdate:
    """The owner of `update` for the scope "step": one graph where the places allow it."""

    parts: Any
    name: str
    settings: Mapping[str, Any]
    programs: dict[str, Program] = attrs.field(init=False, eq=False)

    @programs.default
    def _made(self) -> Any:
        return _programs(self.name, self.settings, _whole, _finish, _finish_and_update)

    def __call__(self, state: TrainState, window: MicroBatches) -> bool | Tensor:
        """Update the weights; false where the update was skipped."""
        if state.unproven:  # the first update of this step on this state
            _check_ranks(self.name)
        if self.settings.get("mode") not in CUDA_GRAPHS:
            return self._update(state, window)
        # All graphs of an update belong together; the next update's write over what they returned.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        applied = self._update(state, window)
        _copy_found(state)
        return _copied(applied)  # type: ignore[no-any-return]

    def _update(self, state: TrainState, window: MicroBatches) -> bool | Tensor:
        parts, apply, optimizer = self.parts, self.parts.apply, state.optimizer
        form = apply.form(optimizer) if type(apply) is CompiledApply else None
        groups = form and optimizer and form.bind(optimizer)
        if form is not None and optimizer is not None and groups is None and not optimizer.state:
            with torch.compiler.set_stance("force_eager"):  # the optimizer makes its own state
                return parts(state, window)  # type: ignore[no-any-return]
        if groups and window[1] == 1 and type(parts.gradients) is CompiledGradients:
            return self._in_one(state, window, form, groups)  # type: ignore[no-any-return]
        parts.gradients(state, window)
        return self._after_gradients(state, form, groups)  # type: ignore[no-any-return]

    def _in_one(self, state: TrainState, window: MicroBatches, form: Any, groups: Any) -> Any:
        parts, outcome = self.parts, state.begin_update(1)
        for batch in window[0]:
            with parts.gradients.parts.around(state, True), _as_groups(state):
                state.output, state.verdict, applied = self.programs["_whole"](
                    parts, state, batch, form, groups
                )
            outcome.samples += batch_size(batch)
        check_count(len(outcome.parts), 1)
        return True if applied is None else applied

    def _after_gradients(self, state: TrainState, form: Any, groups: Any) -> Any:
        parts, outcome = self.parts, state.outcome
        state.outcome = _known(state) if outcome.length != 1 else outcome
        try:
            with _as_groups(state):
                if groups:
                    state.verdict, applied = self.programs["_finish_and_update"](
                        parts, state, form, groups
                    )
                    return True if applied is None else applied
                state.verdict = self.programs["_finish"](parts, state)
        finally:
            state.outcome = outcome
        return parts.apply(state, parts.recompute)


def _copy_found(state: TrainState) -> None:
    """Copy what the state keeps of an update out of the memory of its CUDA graphs."""
    state.outcome.parts = _copied(state.outcome.parts)
    state.output, state.grad_norm = _copied(state.output), _copied(state.grad_norm)


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, value)


def _check_ranks(name: str) -> None:
    """Hooks that average gradients over ranks do not run where autograd is in a graph."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise CompositionError(
            name,
            f"{group.get_world_size()} ranks, whose gradients would not be averaged in its graph",
            'with_compile("model"), which the strategies of distributed() go round',
        )
