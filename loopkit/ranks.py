"""The processes that train one state together; one process is the case of one rank."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from loopkit.errors import DamageError, LoopkitError, NonFiniteError, RankError, UsageError
from loopkit.parallel.environment import environment

_NOTHING = nullcontext()


@attrs.define(eq=False)
class Ranks:
    """How the processes that train one state work together; a state holds it as `state.ranks`.

    This is one process, for which each method is the identity; `distributed` puts another
    in its place. Ranks that hold the same data (tensor parallel ones) count once in `size`.

    Attributes:
        rank: Number of this process among those that have data of their own.
        size: How many those are.
        shards_tensors: Whether some parameters are DTensors, of which each holds a part.
        shards_optimizer: Whether each holds the optimizer state of its own part only.
        alone: Whether there is no other process.
        device: Where this process computes, if its parameters are kept elsewhere.

    Example:
        >>> Ranks().is_first, Ranks().size
        (True, 1)
    """

    rank: int = 0
    size: int = 1
    shards_optimizer: bool = False
    shards_tensors: bool = False
    device: torch.device | None = None
    alone: ClassVar[bool] = True

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks' data, in place."""
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest on any rank, in place."""
        return tensor

    def share(self, data: Any) -> Any:
        """This rank's part of some data, for a run: the same one each time.

        Raises:
            UsageError: Where there are several processes, and this state is not set up for them.
        """
        if (size := _processes()) > 1:  # each would train on all of it, and nobody would see
            raise UsageError(
                "state.ranks.share(data)",
                f"{size} processes, and a state that is not set up for them",
                "state = step.set_up(state) before, with @lk.distributed() on the step; where"
                " each process is to train by itself, the data as it is",
            )
        return data

    def share_once(self, data: Any, limit_batches: float | None = None) -> Any:  # noqa: ARG002
        """This rank's part of some data, to be read by itself; of all ranks' first batches."""
        return data

    def agree(self, flag: int) -> int:
        """The largest number of any rank, so true on all where it is on any; waits for all."""
        return flag

    def from_first(self, value: Any) -> Any:
        """The first rank's value, which has to pickle."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of the ranks that share the data, in their order, on each of them."""
        return [value]

    def part_of(self, counts: list[int]) -> int:
        """This rank's count, of those of all; the sum stays where they were of other ranks.

        Example:
            >>> Ranks(rank=1, size=2).part_of([7, 4]), Ranks(rank=1, size=2).part_of([5, 4, 4])
            (4, 6)
        """
        if len(counts) == self.size:
            return counts[self.rank]
        each, left = divmod(sum(counts), self.size)
        return each + (self.rank < left)

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """The parts of tensors that this process holds; what acts on elements needs no more."""
        return tensors

    def among(self, flag: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """A process group of the ranks that say True, for those; None for all."""
        return _NOTHING

    def forward(self, function: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """Run the forward of one micro-batch."""
        return function(state, batch)

    @property
    def number(self) -> int:
        """Number of this process among all, those that hold the same data too."""
        return 0

    @property
    def spread(self) -> bool:
        """Whether a process holds only a part of what is saved."""
        return self.shards_tensors or self.shards_optimizer

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on each of them."""
        return [value]

    def aside(self) -> Callable[[Any], list[Any]]:
        """What does the same in a thread, beside the training; all have to call this."""
        return self.everyone

    def unsynced(self) -> AbstractContextManager[Any]:
        """A context in which gradients add up on each rank by itself."""
        return _NOTHING

    def in_parts(self, state: Any) -> Any:
        """`state.state_dict()`, with a `Part` for what is spread; all have to call it."""
        return state.state_dict()

    def fitted(self, state: Any, state_dict: Any) -> Any:  # noqa: ARG002
        """A whole state dict as this rank's part of the state takes it."""
        return state_dict

    def whole(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors that are spread over ranks put together, on the first one; all call it."""
        return tensors

    def updated(self) -> None:
        """What follows each update."""

    def explain(self, error: Exception, when: str) -> None:
        """Tell the other ranks of this one's error; one of a collective names the rank behind it.

        Raises:
            RankError: In place of an error of a collective.
        """

    def evaluating(self, model: torch.nn.Module) -> AbstractContextManager[Any]:  # noqa: ARG002
        """A context, to enter any number of times, in which all have rank 0's buffers of now."""
        return _NOTHING


ALONE = Ranks()
"""One process."""


def _processes() -> int:
    """How many were started together, whether they have joined or not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    found = environment()
    return 1 if found is None else found.world_size


def together(ranks: Ranks, what: str, action: Callable[[], Any]) -> Any:
    """Do on the first rank what only one process may, and give all ranks what it gave.

    Raises:
        RankError: On the other ranks, if the first one failed; there, its own error.
    """
    if ranks.alone:
        return action()
    result, failure = None, None
    if ranks.is_first:
        try:
            result = action()
        except Exception as error:
            ranks.from_first((None, f"{type(error).__name__}: {error}"))
            raise
    result, failure = ranks.from_first((result, failure))
    if failure is not None:
        raise RankError(what, f"that rank 0 failed at it: {failure}", "as that error says")
    return result


Exchange = Callable[[Any], list[Any]]
"""What gives each process the values of all, in their order."""


def everywhere(exchange: Exchange, what: str, action: Callable[[], Any]) -> Any:
    """Do on every rank what may fail on one: then it fails on all.

    Args:
        exchange: `ranks.everyone`; or in a thread what `ranks.aside()` gave.
        what: For the error.
        action: What must not talk to other ranks: it may end early.

    Raises:
        DamageError: On all, where it is what every rank that failed found.
        NonFiniteError: On the ranks that did not fail, where one found that.
        RankError: On the ranks that did not fail, otherwise; on the others, their own error.
    """
    result = failure = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001  # raised below, when the others know
        failure = error
    try:
        said = exchange(failure and _told(failure))
    except Exception as error:
        raise failure or error from error
    failed = [(rank, *told) for rank, told in enumerate(said) if told]
    if not failed:
        return result
    damaged = all(kind is DamageError for _, kind, _ in failed)
    if failure is not None and isinstance(failure, DamageError) == damaged:
        raise failure
    rank, kind, words = next(entry for entry in failed if (entry[1] is DamageError) == damaged)
    where = "that rank {} failed at it: {}" if kind is RankError else "{1}, on rank {0}"
    failure = kind(what, where.format(rank, words), "as that error says")
    raise failure


def _told(error: Exception) -> tuple[type[LoopkitError], str]:
    """What it is for ranks that are well: the same where the state, or a file, is at fault."""
    for kind in (DamageError, NonFiniteError):
        if isinstance(error, kind):
            return kind, error.found
    return RankError, f"{type(error).__name__}: {error}"


def is_main_rank() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one.

    Example:
        >>> is_main_rank()
        True
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # launched by torchrun, and not joined yet
