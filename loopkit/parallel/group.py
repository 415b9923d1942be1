"""The process group: made when it is first needed, taken as it is where there is one."""

import atexit
import datetime
import os

import torch
import torch.distributed as dist

from loopkit.parallel.environment import environment
from loopkit.parallel.failure import report_uncaught

TIMEOUT_S = 300.0


def join(timeout_s: float = TIMEOUT_S) -> bool:
    """Join the process group, if a launcher has started several processes.

    Args:
        timeout_s: Seconds after which a rank that waits for another gives up.

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
        dist.init_process_group(timeout=datetime.timedelta(seconds=timeout_s))
        atexit.register(_leave)
        report_uncaught()
    return dist.get_world_size() > 1


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
