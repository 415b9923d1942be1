"""Running modules in evaluation mode, and leaving each as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from loopkit.given import check_state
from loopkit.position import generators_of
from loopkit.rng import rng_state, set_rng_state
from loopkit.state import TrainState


@contextmanager
def eval_modes(state: TrainState) -> Iterator[None]:
    """The state's modules in eval mode; then each as it was, one by one.

    `model.train()` afterwards would wake up a BatchNorm that its owner has frozen.

    Args:
        state: Its model, and the modules among its extras.
    """
    extras = (extra for extra in state.extras.values() if isinstance(extra, nn.Module))
    modes = {m: m.training for root in (state.model, *extras) for m in root.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def inference(state: TrainState) -> Iterator[nn.Module]:
    """The model to be used by hand between updates: in eval mode, and without gradients.

    Each module has its own mode again afterwards, as after `evaluate`: what its owner has
    frozen stays frozen, where `model.train()` would wake it up. What is computed here may go
    into a loss later. It draws random numbers as any code does, and of parameters that lie in
    parts on several ranks all of them have to use the model.

    Args:
        state: Its model, and the modules among its extras.

    Returns:
        The model; within `ema_weights(state)` with the averages.

    Raises:
        UsageError: If it is no state.

    Example:
        >>> state = TrainState(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        >>> with inference(state) as model:
        ...     out = model(torch.ones(1, 2))
        >>> out.requires_grad, model.training
        (False, True)
    """
    check_state("lk.inference(state)", state)
    with eval_modes(state), torch.no_grad():
        yield state.model


@contextmanager
def untouched_rng(device: torch.device, loaders: Iterable[Any] = ()) -> Iterator[None]:
    """Leave the random numbers of torch, NumPy and Python as they were.

    A loader draws some, shuffled or not, and its samples may draw more.

    Args:
        device: Whose generator is kept, beside the CPU's.
        loaders: Data whose own generators are kept; training may share one.
    """
    generators = [(g, g.get_state()) for loader in loaders for g in generators_of(loader)]
    before = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)
        for generator, state in generators:
            generator.set_state(state)


@contextmanager
def scratch_statistics(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Let BatchNorms write their running statistics to copies, which are thrown away.

    For forward passes that are not the training's own: what is computed again, or at
    other weights. The buffers are replaced, not copied back: autograd may have saved them.

    Args:
        model: Whose BatchNorms (and other norms with running statistics).

    Returns:
        The norms with running statistics, by name.
    """
    norms: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    }
    own = {module: dict(module._buffers) for module in norms.values()}  # noqa: SLF001
    try:
        for module, buffers in own.items():
            for name, buffer in buffers.items():
                setattr(module, name, None if buffer is None else buffer.clone())
        yield norms
    finally:
        for module, buffers in own.items():
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
