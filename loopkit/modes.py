"""Running modules in evaluation mode, and leaving each as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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
