"""When a rank fails, the others end soon, and say which one it was and why."""

import contextlib
import datetime
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from loopkit.errors import RankError

PREFIX = "loopkit/failure/"
ANSWER_S = 3.0  # how long ranks that find the group broken wait for word from the others


def _store() -> Any:
    """A client of the group's store, with a time limit of its own."""
    store: Any = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    return store.clone()


def tell(error: BaseException) -> None:
    """Leave word for the other ranks that this one has failed, and of what; at most one second."""
    if not dist.is_initialized() or isinstance(error, RankError):
        return
    words = "".join(traceback.format_exception_only(error)).strip()
    asked(_leave_word, 1.0, words[:1000])


def _leave_word(words: str) -> None:
    store = _store()
    store.set_timeout(datetime.timedelta(seconds=1))
    store.set(f"{PREFIX}{dist.get_rank()}", words)


class Question(threading.Thread):
    """A question to the store, which may never be answered.

    Torch's store waits without end for some answers, whatever its time limit, where the link to
    its host is cut rather than closed (TCPStore::check of torch 2.13); so the thread is left to it.
    """

    def __init__(self, function: Callable[..., str | None], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.answer: str | None = None

    def run(self) -> None:
        """Ask."""
        with contextlib.suppress(RuntimeError, ValueError):  # the store's host is gone
            self.answer = self.function(*self.arguments)


def asked(function: Callable[..., str | None], seconds: float, *arguments: Any) -> str | None:
    """What a function that talks to the store returns; None if it fails, or takes longer."""
    question = Question(function, *arguments)
    question.start()
    question.join(seconds)
    return question.answer


def report_uncaught() -> None:
    """Have an error that ends this process told to the other ranks."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        tell(error)
        before(kind, error, at)

    sys.excepthook = hook


def culprits() -> str:
    """Which ranks failed and why, as far as it can be found out; empty if none can be named."""
    found = asked(_culprits, 3 * ANSWER_S)
    if found is None:
        return (
            "the process that the ranks meet at (rank 0's, or the launcher's) gone, or out of reach"
        )
    return found


def _culprits() -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    store = _store()
    store.set_timeout(datetime.timedelta(seconds=ANSWER_S))
    store.set(f"{PREFIX}{rank}/waits", "1")
    said, missing = _roll_call(store, [r for r in range(size) if r != rank])
    if said:
        return "; ".join(f"rank {r} failed: {words}" for r, words in said.items())
    return f"no answer from rank {', '.join(map(str, missing))}: killed, or hung" * bool(missing)


def _roll_call(store: Any, others: list[int]) -> tuple[dict[int, str], list[int]]:
    said: dict[int, str] = {}
    waiting = set(others)
    until = time.monotonic() + ANSWER_S
    while waiting and not said and time.monotonic() < until:
        for other in sorted(waiting):
            if store.check([f"{PREFIX}{other}"]):
                said[other] = store.get(f"{PREFIX}{other}").decode()
            elif store.check([f"{PREFIX}{other}/waits"]):
                waiting.discard(other)
        time.sleep(0.05)
    return said, sorted(waiting)


def is_of_the_group(error: BaseException) -> bool:
    """Whether an error came from a collective, rather than from this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in words for sign in ("gloo", "Gloo", "ProcessGroup", "NCCL", "Connection closed")
    )


def explain(error: Exception, when: str) -> None:
    """Tell the others of this rank's own error; turn an error of the group into one with names.

    Raises:
        RankError: In place of an error of a collective.
    """
    if not dist.is_initialized() or isinstance(error, RankError):
        return
    if not is_of_the_group(error):
        tell(error)
        return
    raise RankError(
        f"{when} on rank {dist.get_rank()} of {dist.get_world_size()}",
        culprits() or f"a failed collective: {error}",
        "a look at that rank's output (all ranks have to call evaluate, save and reduce, and to"
        " break together: lk.agree(flag)); torchrun --max-restarts=3 starts all again, and"
        " checkpoints.restore(state) goes on from the last checkpoint",
    ) from error


def guarded(function: Callable[..., Any], when: str, *arguments: Any) -> Any:
    """Call what communicates, and name the rank that it failed for.

    Raises:
        RankError: In place of an error of a collective.
    """
    try:
        return function(*arguments)
    except Exception as error:
        explain(error, when)
        raise
