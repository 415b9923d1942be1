"""Devices: choosing one, and moving batches to it."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loopkit.errors import UsageError
from loopkit.nested import map_tensors


def device(name: str | Sequence[str] = "auto") -> torch.device:
    """The device to train on: the machine's accelerator if it has one, else the CPU.

    Where a launcher has started several processes on a machine with several devices, each gets
    its own.

    Args:
        name: `"auto"`, or what `torch.device` takes: `"cpu"`, `"cuda:1"`, `"mps"`, `"xpu"`. Or
            a list of those, of which this process gets the one at its place: torchrun says
            which (`LOCAL_RANK`), and without it that is the first.

    Raises:
        UsageError: For a name that torch does not know, or a device that is not there; for a
            list with fewer devices than torchrun has started processes.

    Example:
        >>> device("cpu")
        device(type='cpu')

    Source: https://docs.pytorch.org/docs/stable/accelerator.html
    """
    if not isinstance(name, str):
        name = _own_of(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if accelerator is None else _of_this_process(accelerator)
    wanted = _parsed(name)
    there = {"cpu", "meta"} | ({accelerator.type} if accelerator else set())
    count = torch.accelerator.device_count() if accelerator else 0
    if wanted.type not in there or (
        wanted.type not in {"cpu", "meta"} and (wanted.index or 0) >= count
    ):
        raise UsageError(
            f"lk.device({name!r})",
            f"no such device here (accelerator: {accelerator}, {count} of it)",
            'lk.device("auto"), or the name of a device that is there',
        )
    return wanted


def _of_this_process(accelerator: torch.device) -> torch.device:
    """The whole kind for a single process, whose current device it follows."""
    rank = _local_rank()
    if rank is None:
        return accelerator
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())


def _local_rank() -> int | None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return None


def _own_of(names: Sequence[str]) -> str:
    rank = _local_rank() or 0
    if not isinstance(names, Sequence) or rank >= len(names):
        raise UsageError(
            f"lk.device({names!r})",
            f"no device for the process of LOCAL_RANK {rank}",
            "a list with a device for each process: torchrun --nproc-per-node 2 for two",
        )
    return names[rank]


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"lk.device({name!r})",
            f"a name that torch does not know ({str(error).splitlines()[0]})",
            'lk.device("auto"), "cpu", "cuda:0", "mps" or "xpu"',
        ) from error


def to_device(batch: Any, target: torch.device, *, non_blocking: bool = False) -> Any:
    """A copy of `batch` with every tensor on `target`; containers keep their own type.

    Tuples, lists, dicts, named tuples, attrs classes and dataclasses are walked
    through; objects with a `.to` method move themselves; the rest stays as it is.

    Args:
        batch: Any nesting of those.
        target: Where the tensors go.
        non_blocking: Do not wait for the copy (from pinned memory).

    Example:
        >>> to_device({"x": torch.zeros(2)}, torch.device("cpu"))["x"].device
        device(type='cpu')
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(target, non_blocking=non_blocking)
        return leaf.to(target)

    return map_tensors(move, batch)


def prefetch(batches: Iterable[Any], target: torch.device) -> Iterator[Any]:
    """The batches on `target`, each copied while the one before is being computed on.

    On an accelerator the copy runs one batch ahead, from pinned memory, on a
    stream of its own. On the CPU the batches pass through untouched.

    Args:
        batches: Any iterable of batches.
        target: Where they go.

    Example:
        >>> list(prefetch([1, 2], torch.device("cpu")))
        [1, 2]
    """
    return iter(batches) if target.type == "cpu" else _copied_ahead(batches, target)


def _copied_ahead(batches: Iterable[Any], target: torch.device) -> Iterator[Any]:
    copies = _copy_stream(target)
    waiting: tuple[Any, torch.Event] | None = None
    for batch in batches:
        # Memory that a copy gets is that of earlier batches, which may still be read. And it is the
        # target's stream that counts: another device may be the current one.
        copies.wait_stream(torch.accelerator.current_stream(target))
        with copies:
            moved = to_device(map_tensors(_pinned, batch), target, non_blocking=True)
            arrived = copies.record_event()
        if waiting is not None:
            yield _received(*waiting, target)
        waiting = moved, arrived
    if waiting is not None:
        yield _received(*waiting, target)


@functools.cache
def _copy_stream(target: torch.device) -> torch.Stream:
    """One for each device: torch keeps the memory that was freed of each stream apart."""
    return torch.Stream(target)


def _pinned(leaf: Any) -> Any:
    """Page-locked memory: from pageable memory a "non-blocking" copy blocks."""
    if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided:
        return leaf if leaf.is_pinned() else leaf.pin_memory()
    return leaf


def _received(batch: Any, arrived: torch.Event, target: torch.device) -> Any:
    torch.accelerator.current_stream(target).wait_event(arrived)
    return batch
