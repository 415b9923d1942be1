"""Compiling: the model, or the whole update."""

import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import one_of
from loopkit.compiled import (
    CUDA_GRAPHS,
    CompiledApply,
    CompiledGradients,
    CompiledUpdate,
    TracedBackward,
)
from loopkit.compose import Decorator, compose, own, wrap
from loopkit.errors import UsageError
from loopkit.graphs import Watch
from loopkit.nested import map_tensors
from loopkit.state import TrainState
from loopkit.types import Backward, Forward, Output, Transform

Blocks = type[nn.Module] | str | Sequence[type[nn.Module] | str]


@attrs.frozen
class CompileModel:
    """The owner of `compile` for the scope "model": the module, or its blocks, in place."""

    name: str
    blocks: tuple[Any, ...]
    settings: dict[str, Any]

    def __call__(self, state: TrainState) -> None:
        """Mark what is to be compiled; torch compiles it when it is first called."""
        for module in self._chosen(state.model):
            if type(module).forward.__module__.startswith("torch.nn"):
                # Module.compile does nothing for torch's own layers, whose code dynamo skips
                # unless it is called from other code (torch 2.13)
                called = torch.compile(Called(module), **self.settings)
                module._compiled_call_impl = called  # noqa: SLF001
            else:
                module.compile(**self.settings)

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        if not self.blocks:
            return [model]
        found = [
            module
            for name, module in model.named_modules()
            if any(_matches(name, module, block) for block in self.blocks)
        ]
        if not found:
            kinds = sorted({type(module).__name__ for module in model.modules()})
            raise UsageError(
                self.name,
                f"no such block in {type(model).__name__}, which is made of {kinds}",
                'blocks=nn.TransformerEncoderLayer, or a pattern of names: blocks="layers.*"',
            )
        return found


@attrs.frozen(eq=False)
class Called:
    """A call of a module, from code that dynamo does not skip."""

    module: nn.Module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What `Module.__call__` runs where nothing is compiled."""
        return self.module._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]  # noqa: SLF001


def _matches(name: str, module: nn.Module, block: Any) -> bool:
    if isinstance(block, str):
        return fnmatch.fnmatchcase(name, block)
    return isinstance(module, block)


@attrs.frozen
class WatchGraphs:
    """A look, after each update, at how often the model was compiled again."""

    inner: Transform
    watch: Watch

    def __call__(self, state: TrainState) -> None:
        """Look, then go on."""
        self.watch.look()
        self.inner(state)


@attrs.frozen
class CopyOutput:
    """A layer of `forward`: what it returns is copied out of the memory of a model's CUDA graph.

    The next call writes there, and torch refuses to read what it has written over.
    """

    inner: Forward

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The same output, in memory of its own."""
        return map_tensors(_copied, self.inner(state, batch))


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@attrs.frozen
class OwnGradients:
    """A layer of `backward`: gradients of a window are copied out of the memory of a CUDA graph.

    Autograd takes what a graph returns for the `.grad`, and the next micro-batch writes there: an
    error of torch, or a wrong sum (pytorch/pytorch#169545).
    """

    inner: Backward

    def __call__(self, state: TrainState, loss: Tensor) -> None:
        """Run it, then copy where more is to be added."""
        self.inner(state, loss)
        if state.window[1] != 1:
            for parameter in state.parameters_with_grad():
                parameter.grad = _copied(parameter.grad)


def with_compile(
    scope: str = "model",
    *,
    blocks: Blocks = (),
    mode: str | None = None,
    dynamic: bool | None = None,
    backend: str = "inductor",
    fullgraph: bool = False,
) -> Decorator:
    """Compile the model, or the whole update, with `torch.compile`.

    `"model"` compiles `state.model` in place, before anything shards it: it stays the
    user's module, with plain keys in its `state_dict`. With `blocks` only those of
    its modules, which compiles faster where a model repeats one block many times.

    `"step"` compiles forward, backward, and what all decorators put between those and the
    optimizer's update, into one graph; the optimizer's too, where torch.optim has a functional
    form of it, on the optimizer's own state. A window of several micro-batches has one
    graph for each micro-batch and one for the rest. The first update runs uncompiled, for
    the optimizer to make its state. What must be known before the optimizer runs, as
    `with_nonfinite("raise")` does, runs between two graphs; contexts round a micro-batch
    are entered outside of its graph; where dynamo cannot trace something, a warning says
    what, and the update runs in pieces. Gradients are not kept after the update.

    Numbers are those of the uncompiled step up to rounding: fused operations round once where
    single ones round each time (float32: about 1e-6 of a value for each update; under bf16
    autocast about 1e-2, for bf16 has 8 bits). Dropout draws other random numbers, unless
    `torch._inductor.config.fallback_random` is set. fp16 loss scaling runs in pieces: torch's
    GradScaler is not traced.

    `mode="reduce-overhead"` has torch make CUDA graphs of it, on CUDA: each update is marked as a
    step of theirs, what the state keeps of it, or the step function returns, is copied out of their
    memory, and the optimizer's state is marked as lying still. Counters of the optimizer are moved
    to the device, with `capturable` set in its param groups, as torch does for a compiled
    optimizer. None of it has been run on CUDA yet; on a CPU the mode changes nothing.

    A learning rate that a schedule sets goes in as a tensor, so nothing is compiled again for
    it; with the scope "model" it does not enter what is compiled. To evaluate uncompiled, where
    shapes vary: `with torch.compiler.set_stance("force_eager"): lk.evaluate(...)`; or
    `"eager_on_recompile"`, which uses the graphs that there are.

    Args:
        scope: `"model"` or `"step"`.
        blocks: For "model": module types, or patterns of names (`"layers.*"`), or several.
        mode: As for `torch.compile`: `"reduce-overhead"`, `"max-autotune"`.
        dynamic: As for `torch.compile`.
        backend: As for `torch.compile`.
        fullgraph: For "model": refuse a model that is not one graph.

    Raises:
        UsageError: For another scope, blocks of a step, or blocks that the model has not.
        CompositionError: For a step on several ranks, whose graph would not average gradients.

    Example:
        >>> with_compile("step")
        with_compile('step')

    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html
    """
    chosen = tuple(blocks) if isinstance(blocks, list | tuple) else (blocks,)
    told = {"mode": mode, "dynamic": dynamic, "backend": backend, "fullgraph": fullgraph}
    defaults = {"mode": None, "dynamic": None, "backend": "inductor", "fullgraph": False}
    shown = {"blocks": blocks, **{k: v for k, v in told.items() if v != defaults[k]}}
    listed = "".join(f", {k}={v!r}" for k, v in shown.items() if v not in ((), []))
    name = f"with_compile({scope!r}{listed})"
    one_of(name, "scope", scope, ("model", "step"))
    if scope == "model":
        layer = functools.partial(WatchGraphs, watch=Watch(name))
        copied: dict[str, Any] = {"forward": CopyOutput, "backward": OwnGradients}
        layers = copied if mode in CUDA_GRAPHS else {}
        return compose(
            own(name=name, compile=CompileModel(name, chosen, told)),
            wrap(name=name, after=layer, **layers),
        )
    if chosen or fullgraph:
        raise UsageError(name, f"{sorted(shown)}", 'with_compile("step"), without these')
    settings = {key: told[key] for key in ("mode", "dynamic", "backend")}
    return own(
        name=name,
        gradients=functools.partial(CompiledGradients, name=name, settings=settings),
        backward=TracedBackward(),
        apply=CompiledApply(name, settings),
        update=functools.partial(CompiledUpdate, name=name, settings=settings),
    )
