"""Processes that run tests on several ranks: started once, with a group of their own each time.

They are forked from a process that has imported what they need and done nothing else.
"""

import atexit
import gc
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loopkit.parallel.launch import free_port

IMPORTED = ("pytest", "hypothesis", "torch.distributed.fsdp", "torchmetrics", "loopkit.testing")
LIMIT_S = 250  # below pytest's own, which would not say which rank it was


def _work(pipe, rank, paths):
    sys.path[:0] = paths
    torch.set_num_threads(1)
    gc.freeze()  # tests collect before they fork; what was imported need not be walked through
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    while (task := pipe.recv()) is not None:
        world, port, function, arguments = task
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        try:
            torch.manual_seed(1000 + rank)  # ranks differ, unless the library sees to it
            answer = True, function(*arguments)
        except BaseException:  # noqa: BLE001
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)


def _answer_of(pipe):
    try:
        return pipe.recv() if pipe.poll(LIMIT_S) else (False, "still running at the time limit")
    except EOFError:
        return False, "its process died: see the captured stderr"


class Pool:
    """Up to four ranks."""

    def __init__(self):
        self.workers = []

    def run(self, world, function, *arguments):
        """What the function returns on each of `world` ranks."""
        self._start(world)
        port = free_port()
        for _, pipe in self.workers[:world]:
            pipe.send((world, port, function, arguments))
        answers = [_answer_of(pipe) for _, pipe in self.workers[:world]]
        if failed := [(rank, what) for rank, (fine, what) in enumerate(answers) if not fine]:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}:\n{what}" for rank, what in failed))
        return [value for _, value in answers]

    def _start(self, world):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED])
        paths = [str(Path(__file__).parent), str(Path(__file__).parent / "distributed")]
        while len(self.workers) < world:
            ours, theirs = context.Pipe()
            # Not as a daemon, which may not have data workers of its own
            process = context.Process(target=_work, args=(theirs, len(self.workers), paths))
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self):
        """End them; the next run starts others."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


POOL = Pool()
atexit.register(POOL.stop)
