"""Numbers to log beside the metrics: learning rates, and what the device is doing."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import torch

from loopkit.errors import UsageError
from loopkit.given import check_state
from loopkit.state import TrainState

GIB = 2**30


def learning_rates(state: TrainState, *more: str) -> dict[str, Any]:
    """The learning rate of each param group, as a row to log.

    `log(state, **state.metrics, **lk.learning_rates(state))`, or
    `log.wrap(run, extras=[lk.learning_rates])`. Groups are named by their `"name"`, else
    numbered: `lr/decay`, `lr/0`.

    Args:
        state: A state with an optimizer.
        *more: Other values of the param groups: `"momentum"`, `"weight_decay"`, `"betas"`.

    Raises:
        UsageError: If the state has no optimizer, or no group has such a value.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> groups = [{"params": [model.weight], "name": "matrix"}, {"params": [model.bias]}]
        >>> learning_rates(TrainState(model, torch.optim.SGD(groups, lr=0.1)), "momentum")
        {'lr/matrix': 0.1, 'momentum/matrix': 0, 'lr/1': 0.1, 'momentum/1': 0}
    """
    check_state("learning_rates(state)", state)
    if state.optimizer is None:
        raise UsageError(
            "learning_rates(state)", f"{state!r}", "a state that is trained: it has an optimizer"
        )
    found: dict[str, Any] = {}
    for number, group in enumerate(state.optimizer.param_groups):
        for key in ("lr", *more):
            value = _value(group, key)
            if isinstance(value, tuple | list):
                values = {f"{_named(group, number)}/{i}": item for i, item in enumerate(value)}
            else:
                values = {_named(group, number): value}
            found |= {f"{key}/{name}": item for name, item in values.items()}
    return found


def _named(group: Mapping[str, Any], number: int) -> str:
    return str(group.get("name", number))


def _value(group: Mapping[str, Any], key: str) -> Any:
    if key in group:
        return group[key]
    raise UsageError(
        f"learning_rates(state, {key!r})",
        f"a param group without it: {sorted(map(str, group.keys() - {'params'}))}",
        "the name of a value of the param groups",
    )


def device_stats(state: TrainState) -> dict[str, float]:
    """Memory and load of the state's device, in GiB and percent, as a row to log.

    `memory_gib`, `reserved_gib` and `peak_gib` of torch's allocator, on CUDA with its
    management library (nvidia-ml-py) also `utilisation_percent`, `temperature_c` and
    `power_w`; on the CPU the memory of the process, and with psutil the load of the machine.

    Args:
        state: On any device.

    Example:
        >>> sorted(device_stats(TrainState(torch.nn.Linear(1, 1))))[:2]
        ['device/memory_gib', 'device/peak_gib']
    """
    check_state("device_stats(state)", state)
    device = state.device
    stats = _of_cpu() if device.type in {"cpu", "meta"} else _of_accelerator(device)
    return {f"device/{name}": value for name, value in stats.items()}


def _of_cpu() -> dict[str, float]:
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    if importlib.util.find_spec("psutil") is None:
        return {"memory_gib": peak, "peak_gib": peak}
    psutil = importlib.import_module("psutil")

    now = psutil.Process().memory_info().rss / GIB
    load = psutil.cpu_percent()
    return {"memory_gib": now, "peak_gib": peak, "utilisation_percent": load}


def _of_accelerator(device: torch.device) -> dict[str, float]:
    module: Any = torch.get_device_module(device)
    asked = {
        "memory_gib": ("memory_allocated", GIB),
        "reserved_gib": ("memory_reserved", GIB),
        "peak_gib": ("max_memory_allocated", GIB),
        "utilisation_percent": ("utilization", 1),
        "temperature_c": ("temperature", 1),
        "power_w": ("power_draw", 1000),
    }
    stats = {}
    for name, (function, unit) in asked.items():
        # Not every device has each, and the last three need a library of the driver's
        with contextlib.suppress(AttributeError, ImportError, RuntimeError):
            stats[name] = float(getattr(module, function)(device)) / unit
    return stats
