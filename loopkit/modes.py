"""Running modules in evaluation mode, and leaving each as it was."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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
    devices = [] if device.type in {"cpu", "meta"} else [device]
    found = [getattr(loader, "generator", None) for loader in loaders]
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    states, python = [generator.get_state() for generator in own], random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)
