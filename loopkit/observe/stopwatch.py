"""Time as the device spends it: host clock on the CPU, events on an accelerator."""

import time

import torch

Mark = float | torch.Event


def mark(device: torch.device) -> Mark:
    """This moment: of the host, or, on an accelerator, when it has done what it was given so far.

    Example:
        >>> since(mark(torch.device("cpu")), mark(torch.device("cpu"))) >= 0
        True
    """
    if device.type in {"cpu", "meta"}:
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def is_past(moment: Mark) -> bool:
    """Whether the device has come there; this does not wait for it."""
    return isinstance(moment, float) or moment.query()


def since(start: Mark, end: Mark) -> float:
    """Seconds from one moment to another; both must be past."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return start.elapsed_time(end) / 1e3  # type: ignore[union-attr,arg-type]
