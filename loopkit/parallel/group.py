"""The process group: made when it is first needed, taken as it is where there is one."""

import atexit
import datetime
import gc
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from loopkit.parallel.environment import environment
from loopkit.parallel.failure import report_uncaught

TIMEOUT_S = 300.0
LAST_S = 0.1  # at the end of the process
START_S = 600.0  # until the first update: processes start apart, and compile


def join(timeout_s: float = TIMEOUT_S) -> bool:
    """Join the process group, if a launcher has started several processes.

    Args:
        timeout_s: Seconds after which a rank that waits for another gives up; longer at first.

    Returns:
        Whether there is a group of more than one process.
    """
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        found = environment()
        if found is None or found.world_size == 1:
            return False
        os.environ |= found.variables()
        if torch.cuda.is_available():
            torch.cuda.set_device(found.local_rank % torch.cuda.device_count())
        patience = datetime.timedelta(seconds=max(START_S, timeout_s))
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        # With a fixed master port torchrun keeps its store over restarts, and with it the
        # addresses of processes that are gone (seen with torch 2.13): so a name for each life.
        number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        life = dist.PrefixStore(f"life{number}", store)  # type: ignore[attr-defined]
        dist.init_process_group(store=life, rank=rank, world_size=size, timeout=patience)
        atexit.register(_leave)
        report_uncaught()
    return dist.get_world_size() > 1


def wait_at_most(timeout_s: float, groups: Iterable[Any]) -> None:
    """From now on give up on other ranks after this many seconds."""
    for group in groups:
        # Torch has no public way to change it; its own trainers (torchtitan) use this one
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)  # noqa: SLF001


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads let go of the last collective's tensors a moment after it is done; one
        # that needs Python's lock for that while Python ends aborts the process, whose code is
        # then that of SIGABRT (seen with torch 2.13; pytorch/pytorch#179291)
        time.sleep(LAST_S)
        gc.freeze()  # or Python's last collections walk through all of torch, for half a second
