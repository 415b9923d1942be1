"""Numbers on their way from the device to the host."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.errors import UsageError

Number = bool | int | float


@attrs.define
class Fetched:
    """Values by name, some of them still being copied from a device.

    Attributes:
        known: Those that the host has; a value that is on its way holds its place.
        copies: For each device: names, where the values arrive, and the event of their arrival.
    """

    known: dict[str, Any]
    copies: list[tuple[list[str], Tensor, torch.Event]] = attrs.field(factory=list)

    def ready(self) -> bool:
        """Whether `values` would not wait."""
        return all(arrived.query() for _, _, arrived in self.copies)

    def values(self) -> dict[str, Any]:
        """All values, in the order in which they were given; this waits for those on their way."""
        for names, numbers, arrived in self.copies:
            arrived.synchronize()
            self.known.update(zip(names, numbers.tolist(), strict=True))
        self.copies = []
        return self.known


def fetch(call: str, values: Mapping[str, Any]) -> Fetched:
    """Start copying what is on a device to the host, all of one device at once, without waiting.

    Args:
        call: What the user wrote, for errors.
        values: Numbers, text, and tensors of one element.

    Raises:
        UsageError: For a value that is none of these.

    Example:
        >>> fetch("log(state, ...)", {"loss": torch.tensor(0.5), "n": 3}).values()
        {'loss': 0.5, 'n': 3}
    """
    fetched, devices = Fetched({}), dict[torch.device, dict[str, Tensor]]()
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_cpu:
            devices.setdefault(value.device, {})[name] = value
            fetched.known[name] = math.nan
        else:
            fetched.known[name] = plain(call, name, value)
    fetched.copies = [_copied(device, tensors) for device, tensors in devices.items()]
    return fetched


def _copied(
    device: torch.device, tensors: dict[str, Tensor]
) -> tuple[list[str], Tensor, torch.Event]:
    wide = torch.float32 if device.type == "mps" else torch.float64
    with torch.no_grad():
        stacked = torch.stack([value.detach().reshape(()).to(wide) for value in tensors.values()])
    # From a tensor of our own into memory of our own: whoever changes theirs changes nothing here.
    host = torch.empty(stacked.shape, dtype=wide, pin_memory=device.type == "cuda")
    host.copy_(stacked, non_blocking=True)
    arrived = torch.Event(device)
    arrived.record(torch.accelerator.current_stream(device))
    return [*tensors], host, arrived


def plain(call: str, name: str, value: Any) -> Number | str:
    """A value that the host has, as a plain number or text.

    Raises:
        UsageError: If it is neither, nor a tensor or array of one element.

    Example:
        >>> plain("log(state, n=...)", "n", torch.tensor([4]))
        4
    """
    if isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (2,))) == 1:
        return value.item()  # type: ignore[no-any-return]
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise UsageError(
        call,
        f"{name} = a {type(value).__name__}{shape}",
        f"a number, text, or a tensor of one element, such as {name}.mean()",
    )
