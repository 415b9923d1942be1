"""Starting several processes from Python, for notebooks and tests."""

import os
import random
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from loopkit.check import at_least_one, one_of
from loopkit.errors import RankError
from loopkit.parallel.environment import Environment
from loopkit.parallel.failure import tell

GRACE_S = 10.0  # how long the others have to end by themselves, once one has failed
PORTS = range(20_000, 32_000)  # below those that systems give to connections


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *arguments: Any,
    timeout_s: float | None = None,
    start_method: str = "spawn",
) -> list[Any]:
    """Run `main(*arguments)` in several processes on this machine, as torchrun does a script.

    Each process finds the environment that `distributed` reads; the first that fails ends all.

    Args:
        main: What runs in each process; with `"spawn"` it has to be importable.
        num_processes: How many.
        *arguments: Given to each; tensors among them share their memory between the processes.
        timeout_s: Seconds after which all are ended.
        start_method: `"spawn"`; or `"fork"`, for functions of a notebook.

    Returns:
        What `main` returned in each process, by rank.

    Raises:
        RankError: If a process failed; it names the rank, with the traceback from there.

    Example:
        >>> launch(max, 2, 3, 4)
        [4, 4]
    """
    call = f"lk.launch({getattr(main, '__name__', main)}, {num_processes})"
    at_least_one(call, "num_processes", num_processes)
    context: Any = mp.get_context(one_of(call, "start_method", start_method, ("spawn", "fork")))
    port, threads = free_port(), max(1, torch.get_num_threads() // num_processes)
    started = []
    for rank in range(num_processes):
        given = Environment(rank, num_processes, rank, "127.0.0.1", port)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_child, args=(theirs, given, threads, main, arguments), daemon=False
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return _results(call, started, timeout_s)
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def free_port() -> int:
    """A port that nobody listens at, nor any connection will be given meanwhile.

    What the system would choose is free when it says so; but seconds later, when the first
    process listens there, one of its connections may have it.
    """
    ports = random.SystemRandom().sample(PORTS, len(PORTS))  # the user's generator is left alone
    return next(port for port in ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


def _child(
    answer: Connection, given: Environment, threads: int, main: Callable[..., Any], arguments: Any
) -> None:
    import traceback

    local = {"LOCAL_WORLD_SIZE": str(given.world_size)}
    os.environ |= given.variables() | local
    torch.set_num_threads(threads)
    try:
        answer.send((True, main(*arguments)))
        answer.recv()  # tensors are read from this process's memory: so it stays until they are
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent has to hear of it
        tell(error)
        secondary = isinstance(error, RankError)
        answer.send((False, (secondary, traceback.format_exc())))
        os._exit(1)  # a broken group would wait at a normal exit
    finally:
        answer.close()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _results(call: str, started: list[Any], timeout_s: float | None) -> list[Any]:
    found: dict[int, Any] = {}
    failed: dict[int, tuple[bool, str]] = {}
    deadline = time.monotonic() + (timeout_s or float("inf"))
    while len(found) + len(failed) < len(started) and time.monotonic() < deadline:
        waiting = {r: pair for r, pair in enumerate(started) if r not in found and r not in failed}
        wait([pipe for _, pipe in waiting.values()], timeout=0.2)
        for rank, (process, pipe) in waiting.items():
            if pipe.poll():
                _take(rank, process, pipe, found, failed)
        if failed and deadline > time.monotonic() + GRACE_S:
            deadline = time.monotonic() + GRACE_S
    if len(found) == len(started):
        return [found[rank] for rank in range(len(started))]
    raise RankError(call, _told(failed, found, len(started)), "a main that ends on all ranks")


def _take(
    rank: int, process: Any, pipe: Connection, found: dict[int, Any], failed: dict[int, Any]
) -> None:
    try:
        fine, value = pipe.recv()
        if fine:  # what failed does not wait: it may be gone
            pipe.send(None)
    except EOFError:
        process.join(5)
        fine, value = False, (False, f"ended with exit code {process.exitcode}")
    (found if fine else failed)[rank] = value


def _told(failed: dict[int, tuple[bool, str]], found: dict[int, Any], size: int) -> str:
    if not failed:
        late = sorted({*range(size)} - {*found})
        return f"rank {', '.join(map(str, late))} still running at the time limit"
    # Those that failed for another's failure say less than that one.
    rank, (_, words) = min(failed.items(), key=lambda item: (item[1][0], item[0]))
    return f"rank {rank} failed:\n{words}"
