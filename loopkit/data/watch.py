"""Workers of a loader: a hung one is found out and named, and none outlives its epoch."""

import contextlib
import faulthandler
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader

from loopkit.errors import DataError

DATA_TIMEOUT_S = 600.0
POLL_S = 5.0  # how often torch looks whether a worker died
PATIENCE_S = 1.5  # for a worker to finish its batch when it is no longer wanted
STACK = "loopkit-stack"  # a file in memory, found by its name among those a worker has open
STACK_SIGNAL = getattr(signal, "SIGUSR2", None)


@attrs.frozen
class Traced:
    """A `worker_init_fn` that calls another, and lets the worker's stack be asked for.

    What the process had lost track of when it forked is not the worker's to collect: a process
    group or a DDP of an earlier training would wait there for threads that did not come along.

    Attributes:
        inner: The loader's own, if it has one.
    """

    inner: Callable[[int], object] | None

    def __call__(self, worker: int) -> None:
        """Run in a worker when it begins."""
        gc.freeze()
        if STACK_SIGNAL is not None and hasattr(os, "memfd_create"):
            faulthandler.register(STACK_SIGNAL, os.memfd_create(STACK), all_threads=True)
        if self.inner is not None:
            self.inner(worker)


@contextlib.contextmanager
def tracing(loader: Any) -> Iterator[None]:
    """While it lasts, workers that the loader makes can be asked for their stack."""
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        yield
        return
    inner = loader.worker_init_fn
    loader.worker_init_fn = Traced(inner)
    try:
        yield
    finally:
        loader.worker_init_fn = inner


def watch(batches: Any, timeout_s: float) -> None:
    """Let the iterator of a loader with workers raise when no batch has come for so long.

    Raises:
        DataError: Then, from its `next`: with the worker's name, process id, and stack.
    """
    names = ("_try_get_data", "_get_data", "_workers")
    watched = isinstance(getattr(batches, "_get_data", None), Watch)  # of workers that persist
    if not watched and all(hasattr(batches, name) for name in names):
        watching = Watch(weakref.ref(batches), timeout_s)
        vars(batches)["_get_data"] = watching
        watching.guard = threading.Thread(target=_guard, args=(watching,), daemon=True)
        watching.guard.start()


@attrs.define(eq=False)
class Watch:
    """In place of an iterator's `_get_data`: the same, with an end to the waiting.

    Torch's own `timeout` would say neither which worker it was nor what it was doing, and
    would not look for workers that died meanwhile.

    Attributes:
        batches: The iterator, which must be free to go while this lives in it.
        timeout_s: How long to wait.
        since: When the waiting began.
        told: What there is to say of a worker that the guard found hung.
        over: Ends the guard.
        guard: A thread. A tensor is fetched from its worker through a socket, which torch reads
            without a limit: a worker that keeps Python's lock would be waited for there.
    """

    batches: weakref.ref[Any]
    timeout_s: float
    since: float | None = None
    told: DataError | None = None
    over: threading.Event = attrs.field(factory=threading.Event)
    guard: threading.Thread | None = None

    def __call__(self) -> Any:
        """What a worker made next."""
        batches: Any = self.batches()
        self.since = time.monotonic()
        try:
            return self._next(batches, self.since + self.timeout_s)
        except (RuntimeError, OSError, EOFError) as error:
            if self.told is None:
                raise
            end_workers(batches)
            raise self.told from error
        finally:
            self.since = None

    def _next(self, batches: Any, deadline: float) -> Any:
        while (left := deadline - time.monotonic()) > 0:
            got, data = batches._try_get_data(min(POLL_S, left))  # noqa: SLF001
            if got:
                return data
            _check_pinning(getattr(batches, "_pin_memory_thread", None))
        self.since = None
        hung, told = _hang(batches, self.timeout_s)
        _terminate(hung)
        end_workers(batches)
        raise told


def _guard(watching: Watch) -> None:
    limit = watching.timeout_s + PATIENCE_S  # the iterator itself comes first, where it can
    while not watching.over.wait(min(POLL_S, watching.timeout_s)):
        batches, since = watching.batches(), watching.since
        if batches is None:
            return
        if since is not None and time.monotonic() - since > limit:
            hung, watching.told = _hang(batches, watching.timeout_s)
            _forget(batches)
            for worker in hung:
                worker.kill()
            return
        del batches


def _forget(batches: Any) -> None:
    """Have torch expect no more of the workers: it makes an error of the signal that one died.

    That would be raised wherever the main thread is, often while it ends the other workers, and
    stand in the place of what there is to say.
    """
    if vars(batches).get("_worker_pids_set"):
        batches._worker_pids_set = False  # noqa: SLF001
        with contextlib.suppress(ValueError):  # done meanwhile
            _remove_worker_pids(id(batches))


def _check_pinning(thread: threading.Thread | None) -> None:
    if thread is not None and not thread.is_alive():
        raise DataError(
            "DataLoader(..., pin_memory=True)",
            "the thread that pins memory gone",
            "pin_memory=False, to see whether pinning fails",
        )


def _hang(batches: Any, timeout_s: float) -> tuple[list[Any], DataError]:
    """The worker that the next batch is due from, and what to say of it."""
    task = vars(batches).get("_task_info", {}).get(vars(batches).get("_rcvd_idx"), ())
    everyone = vars(batches)["_workers"]
    hung = [everyone[task[0]]] if task else [*everyone]
    told = "; ".join(f"{worker.name} (pid {worker.pid}){stack_of(worker.pid)}" for worker in hung)
    return hung, DataError(
        f"a DataLoader with {len(everyone)} workers",
        f"no batch for {timeout_s:g} s from {told}",
        "a dataset that always returns, or DataLoader(..., timeout=seconds) with more time",
    )


def stack_of(pid: int) -> str:
    """The stacks of a worker's threads, innermost call first; empty where it cannot be had."""
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            if STACK in str(file.readlink()):
                os.kill(pid, STACK_SIGNAL)  # type: ignore[arg-type]
                return f", which is at\n{_written(file)}"
    return ""


def _written(file: Path) -> str:
    text = ""
    for _ in range(20):
        time.sleep(0.05)
        before, text = text, file.read_text(errors="replace")
        if text and text == before:
            break
    return text.strip() or "  (no answer: it is stopped, or waits in the kernel)"


def end_workers(batches: Any) -> None:
    """End the workers of a loader's iterator, also hung ones, within a few seconds.

    Torch gives each worker five seconds to finish, one after the other.
    """
    workers = [*getattr(batches, "_workers", ())]
    impatience = threading.Timer(PATIENCE_S, _terminate, [workers])
    impatience.daemon = True
    if workers:
        impatience.start()
    watching = getattr(batches, "_get_data", None)
    if isinstance(watching, Watch):
        watching.over.set()
    try:
        batches._shutdown_workers()  # noqa: SLF001
    finally:
        impatience.cancel()
        _join(impatience)
        if isinstance(watching, Watch):
            _join(watching.guard)
    for worker in workers:
        if worker.is_alive():  # it has not seen SIGTERM, in the kernel
            worker.kill()
            worker.join(PATIENCE_S)


def _join(thread: threading.Thread | None) -> None:
    """Wait until it is over, for workers of the next epoch are forked best from one thread."""
    if thread is not None and thread.ident is not None:
        thread.join(POLL_S)


def _terminate(workers: list[Any]) -> None:
    for worker in workers:
        worker.terminate()
        if worker.is_alive() and hasattr(signal, "SIGCONT"):
            os.kill(worker.pid, signal.SIGCONT)  # a stopped one sees SIGTERM when it goes on
