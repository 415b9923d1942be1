"""Running modules in evaluation mode, and leaving each as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loopkit.state import TrainState


@contextmanager
def evaluating(state: TrainState, *, inference_mode: bool = True) -> Iterator[None]:
    """The state's modules in eval mode and without gradients; then each as it was, one by one.

    `model.train()` afterwards would wake up a BatchNorm that its owner has frozen.

    Args:
        state: Its model, and the modules among its extras.
        inference_mode: `torch.inference_mode`, else `torch.no_grad`.
    """
    roots = [
        state.model,
        *(extra for extra in state.extras.values() if isinstance(extra, nn.Module)),
    ]
    modes = {module: module.training for root in roots for module in root.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.inference_mode() if inference_mode else torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """Leave torch's random numbers as they were; a loader draws some, shuffled or not."""
    devices = [] if device.type in {"cpu", "meta"} else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
