"""Memory for activations: computing them again, or keeping them on the host."""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from loopkit.check import at_least_one, near
from loopkit.compose import Decorator, wrap
from loopkit.errors import UsageError
from loopkit.modes import scratch_statistics
from loopkit.state import TrainState
from loopkit.types import Forward, Output

Blocks = str | type[nn.Module] | Collection[str | type[nn.Module]] | Callable[[str, nn.Module], Any]


# What is dear to compute again: matrix products, convolutions, attention.
MATMULS = (
    *("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.linear", "aten.convolution"),
    *("aten._scaled_mm", "aten._scaled_dot_product_flash_attention"),
    *("aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention"),
    "aten._scaled_dot_product_flash_attention_for_cpu",
)


@functools.cache
def _operators(names: tuple[str, ...]) -> list[Any]:
    """The overloads of operators, kept by name, because operators do not pickle."""
    found: list[Any] = []
    for name in names:
        space, operator, *overload = name.split(".")
        packet = getattr(getattr(torch.ops, space), operator, None)
        names_there = [] if packet is None else overload or packet.overloads()
        found += [getattr(packet, each) for each in names_there]
    return found


@attrs.frozen(eq=False)
class ComputedAgain:
    """Stands for the `forward` of a block: its activations are computed again for backward.

    As an attribute of the module it leaves the class, names and keys of the model alone.
    """

    block: nn.Module
    save: tuple[str, ...] = ()
    own: Callable[..., Any] | None = None  # a forward that the block had of its own, if it had

    @classmethod
    def of(cls, block: nn.Module, save: tuple[str, ...]) -> "ComputedAgain":
        """For a block, which may have one already."""
        own = vars(block).get("forward")
        return cls(block, save, own.own if isinstance(own, cls) else own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        forward = self.own or functools.partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A compiler computes again as it sees fit: it knows what is mutated, and wants a plain
        # function (torch/_dynamo/variables/higher_order_ops.py).
        if torch.compiler.is_compiling():
            contexts: Any = functools.partial(_selective, self.save) if self.save else None
        else:
            contexts = functools.partial(_contexts, self.block, self.save)
        settings = {} if contexts is None else {"context_fn": contexts}
        return checkpoint(forward, *args, use_reentrant=False, **settings, **kwargs)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _selective(save: tuple[str, ...]) -> Contexts:
    return create_selective_checkpoint_contexts(_operators(save))  # type: ignore[no-untyped-call, no-any-return]


def _contexts(block: nn.Module, save: tuple[str, ...]) -> Contexts:
    """For the first pass, and for the second, which must not count for running statistics."""
    first, again = _selective(save) if save else (nullcontext(), nullcontext())
    return first, _second_pass(again, block)


@contextmanager
def _second_pass(context: AbstractContextManager[Any], block: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(scratch_statistics(block))
        stack.enter_context(context)
        yield


@attrs.frozen
class CheckpointBlocks:
    """Puts `ComputedAgain` on the blocks of a model."""

    blocks: Any
    every: int
    save: tuple[str, ...]

    def __call__(self, state: TrainState) -> None:
        """Find the blocks, and change each in place."""
        found = _blocks_of(state.model, self.blocks)
        if not found:
            _refuse(state.model, self.blocks)
        for block in found[:: self.every]:
            block.forward = ComputedAgain.of(block, self.save)


def _blocks_of(model: nn.Module, blocks: Any) -> list[nn.Module]:
    """The outermost modules that fit, each once."""
    if blocks is None:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        wanted = {child for each in lists for child in each}
        return _outermost(model, lambda name, module: module in wanted)  # noqa: ARG005
    if callable(blocks) and not isinstance(blocks, type):
        return _outermost(model, blocks)
    parts = (blocks,) if isinstance(blocks, str | type) else tuple(blocks)
    types = tuple(part for part in parts if isinstance(part, type))
    names = [part for part in parts if isinstance(part, str)]
    for name in names:
        if not any(fnmatchcase(path, name) for path, _ in model.named_modules()):
            _refuse(model, name)
    return _outermost(
        model, lambda path, m: isinstance(m, types) or any(fnmatchcase(path, n) for n in names)
    )


def _outermost(module: nn.Module, fits: Callable[[str, nn.Module], Any]) -> list[nn.Module]:
    found: dict[nn.Module, str] = {}
    inside: list[str] = []
    for path, each in module.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if path and fits(path, each):
            found[each] = path
            inside.append(f"{path}.")
    return [*found]


def _refuse(model: nn.Module, blocks: Any) -> None:
    shown = "" if blocks is None else f"{blocks!r:.60}"
    names = [path for path, _ in model.named_modules() if path]
    kinds = sorted({type(m).__name__ for m in model.modules()})
    raise UsageError(
        f"with_activation_checkpointing({shown})",
        f"no such block in {type(model).__name__}, whose modules are {', '.join(kinds)[:200]}",
        f"a module type, or names or patterns: {near(str(shown).strip(chr(39)), names)}"[:300],
    )


def with_activation_checkpointing(
    blocks: Blocks | None = None, *, every: int = 1, save: str | Collection[Any] | None = None
) -> Decorator:
    """Compute the activations of blocks again in the backward pass, in place of keeping them.

    Memory falls to the blocks' inputs and one block's activations; time grows by about a
    third. Numbers stay the same bit for bit: dropout draws the same masks again, autocast is
    as it was, and BatchNorm's running statistics count the first pass only. Class, names and
    `state_dict` keys of the modules stay; each block's `forward` is replaced, once.

    Args:
        blocks: Which modules: a type, a name or pattern (`"layers.*"`), several of those, or a
            function `(name, module) -> bool`; the outermost that fit. By default the items of
            each `nn.ModuleList`, where most transformers have their layers.
        every: Each n-th of them only.
        save: Keep the results of some operators all the same: `"matmuls"` (matrix products,
            convolutions and attention, which are dear to compute), or a list of
            `torch.ops.aten` operators.

    Raises:
        UsageError: If no module fits, or `save` is neither.

    Example:
        >>> with_activation_checkpointing(nn.TransformerEncoderLayer, every=2)
        with_activation_checkpointing(TransformerEncoderLayer, every=2)

    Source: https://arxiv.org/abs/1604.06174, https://docs.pytorch.org/docs/stable/checkpoint.html
    """
    parts = [] if blocks is None else [getattr(blocks, "__name__", None) or f"{blocks!r:.80}"]
    parts += [f"every={every!r}"] * (every != 1) + [f"save={save!r:.60}"] * (save is not None)
    name = f"with_activation_checkpointing({', '.join(parts)})"
    if not isinstance(blocks, str | type | Collection | None) and not callable(blocks):
        raise UsageError(name, f"blocks of type {type(blocks).__name__}", "a module type or a name")
    at_least_one(name, "every", every)
    kept = MATMULS if save == "matmuls" else _names_of(name, save)
    return wrap(name=name, prepare=CheckpointBlocks(blocks, every, kept))


def _names_of(call: str, save: Any) -> tuple[str, ...]:
    kinds = torch._ops.OpOverload | torch._ops.OpOverloadPacket  # noqa: SLF001
    given: list[Any] = [] if save is None else [save] if isinstance(save, str) else [*save]
    for each in given:
        if not isinstance(each, kinds):
            raise UsageError(
                call,
                f"save = {each!r:.60}",
                'save="matmuls", or operators: [torch.ops.aten.mm.default]',
            )
    return tuple(map(str, given))


@attrs.frozen
class KeepOnHost:
    """The layer of `with_activation_offload`."""

    inner: Forward

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The step function; what it saves for backward goes to the host's memory."""
        if not torch.is_grad_enabled():
            return self.inner(state, batch)
        pinned = state.device.type != "cpu"
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            return self.inner(state, batch)


def with_activation_offload() -> Decorator:
    """Keep what the forward saves for backward in the host's memory.

    Each saved tensor is copied to pinned memory and back: much slower, and for what fits
    no other way. With `with_activation_checkpointing` only the blocks' inputs are copied,
    which is the usual use. The numbers stay the same bit for bit.

    Example:
        >>> with_activation_offload()
        with_activation_offload()

    Source: https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.save_on_cpu
    """
    return wrap(name="with_activation_offload()", forward=KeepOnHost)
