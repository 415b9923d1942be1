"""The states of all sources of random numbers, as plain data."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

_WITHOUT = {"cpu", "meta"}  # devices without a generator of their own


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's (if it is imported), torch's and the device's generators.

    Args:
        device: Where the training runs; its generator is saved too, unless it is the CPU.

    Example:
        >>> sorted(rng_state(torch.device("cpu")).keys() - {"numpy"})
        ['cpu', 'python']
    """
    states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random.get_state(legacy=False)
        values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in numpy["state"].items()}
        states["numpy"] = {**numpy, "state": values}
    if device.type not in _WITHOUT:
        states[device.type] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def set_rng_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Take back what `rng_state` gave; on another kind of device its own generator stays as it is.

    Example:
        >>> states = rng_state(torch.device("cpu")); a = torch.rand(1), random.random()
        >>> set_rng_state(states, torch.device("cpu")); a == (torch.rand(1), random.random())
        True
    """
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(states["numpy"])
    if device.type not in _WITHOUT and device.type in states:
        module = torch.get_device_module(device)
        module.set_rng_state(states[device.type], *_index(device))


def seed_apart(number: int) -> None:
    """Seed all generators anew, from torch's next number and one that tells processes apart."""
    seed = (int(torch.randint(2**31, ())) + 1_000_003 * number) % 2**32
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # mps has one device, and takes no argument
