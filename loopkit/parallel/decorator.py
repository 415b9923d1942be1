"""`distributed`: the same step on one process and on many."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from loopkit.check import one_of, positive
from loopkit.compose import Decorator, compose, own, wrap
from loopkit.data.order import UNEVEN
from loopkit.data.shard import STREAMS
from loopkit.errors import UsageError
from loopkit.outcome import on_device
from loopkit.parallel.ddp import DDP
from loopkit.parallel.fsdp import FSDP
from loopkit.parallel.group import TIMEOUT_S, join
from loopkit.parallel.group_ranks import GroupRanks
from loopkit.parallel.zero import UpdateOwnPart
from loopkit.rng import seed_apart
from loopkit.state import TrainState
from loopkit.types import Around, Forward, Output, Transform, Verdict


@runtime_checkable
class Strategy(Protocol):
    """What spreads a state over the ranks of the process group; one of one's own can be given."""

    def set_up(self, state: TrainState) -> GroupRanks:
        """Spread the state, in place; how its ranks work together from then on."""
        ...


NAMED: Mapping[str, Strategy] = {
    "auto": DDP(),
    "ddp": DDP(),
    "fsdp": FSDP(),
    "hsdp": FSDP(replicas="hosts"),
    "zero1": DDP(shard_optimizer=True),
    "zero2": FSDP(reshard_after_forward=False),
    "zero3": FSDP(),
}


@attrs.frozen
class Parallelize:
    """The owner of `parallelize`: joins the group, and has the strategy spread the state."""

    strategy: Strategy
    uneven: str
    stream: str | None
    timeout_s: float

    def __call__(self, state: TrainState) -> None:
        """Spread the state over the ranks, if there are several."""
        started = not dist.is_initialized()
        if join(self.timeout_s):
            if state.device.type == "cuda":
                torch.cuda.set_device(state.device)  # where NCCL and FSDP look
            ranks = state.ranks = self.strategy.set_up(state)
            ranks.uneven, ranks.stream = self.uneven, self.stream
            ranks.patience_s = self.timeout_s
            ranks.timeout_s = self.timeout_s if started else None
            _check_start(state)
            if state.restored is not None:
                state.restored.take(state)
            elif ranks.rank:
                seed_apart(ranks.rank)  # the seed is often one for all, and so would dropout be


def _check_start(state: TrainState) -> None:
    steps = state.ranks.gather(state.step)
    if len({*steps}) > 1:
        raise UsageError(
            "a state on several ranks",
            f"updates made before, by rank: {steps}",
            "checkpoints in a folder that all hosts share, and the same restore on every rank",
        )


@attrs.frozen
class ThroughRanks:
    """A layer of `forward`: what averages gradients sees it begin and end."""

    inner: Forward

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The forward, the ranks' way."""
        ranks = state.ranks
        if ranks.alone:  # a frame less between the loop and the step function
            return self.inner(state, batch)
        return ranks.forward(self.inner, state, batch)


@attrs.frozen
class SyncAtLast:
    """A layer of `around`: gradients are averaged at the window's last micro-batch only."""

    inner: Around

    def __call__(self, state: TrainState, last: bool) -> AbstractContextManager[Any]:
        """A context without traffic, but for the last micro-batch."""
        inner, ranks = self.inner(state, last), state.ranks
        if last or ranks.alone:
            return inner
        return ranks.unsynced() if type(inner) is nullcontext else _both(inner, ranks.unsynced())


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@attrs.frozen
class LowerTimeout:
    """A layer of `after`: once an update was made there is less to wait for."""

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Tell the ranks of the update, then go on."""
        state.ranks.updated()
        self.inner(state)


@attrs.frozen
class ShareWeights:
    """A layer of `unscale`: the mean is over the micro-batches of all ranks.

    Strategies leave the mean of the ranks' gradients, `sum_r(g_r) / size`. Where micro-batches
    have weights, or some ranks had fewer, the divisor that is left makes it the one mean.
    """

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Sum the weights over ranks, then go on."""
        outcome, ranks = state.outcome, state.ranks
        if ranks.size > 1:
            weight = outcome.total_weight()
            if weight is not None:
                total = ranks.sum(on_device(weight, torch.float64, state.device).clone())
                # Which has all ranks vote, also those that have nothing, and would find no fault
                state.skip_if(total == 0)
                outcome.divide_by = torch.where(total > 0, total / ranks.size, 1)
            elif outcome.missing:
                taken = len(outcome.parts) * ranks.size
                share = (taken - outcome.missing) / taken
                outcome.divide_by = share if outcome.length else share * len(outcome.parts)
        self.inner(state)


@attrs.frozen
class AgreeVotes:
    """A layer of `verdict`: one rank's vote to skip is the vote of all."""

    inner: Verdict

    def __call__(self, state: TrainState) -> Tensor | None:
        """The largest vote on any rank."""
        verdict = self.inner(state)
        return verdict if verdict is None else state.ranks.largest(verdict)


def distributed(
    strategy: str | Strategy = "auto",
    *,
    uneven: str = "exact",
    stream: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Decorator:
    """Train on all the processes that a launcher has started; on a single one do nothing.

    The same script runs by `python`, by `torchrun`, by `srun` and by `mpirun`. Each rank reads
    its own share of a loader's batches, so the batch size is per rank; the gradient is that of
    the one mean over the micro-batches of all ranks, weighted where the step function returns
    weights. Ranks start from the weights of the first one, and draw random numbers of their own,
    which follow from the seed. The model stays yours: its class (DDP), its `state_dict` keys, and
    `state.model is model`. An optimizer made before is pointed at the shards.

    All ranks skip, raise and stop together. Where one fails, the others end with an error that
    names it, at the latest after `timeout_s`.

    Args:
        strategy: `"ddp"` (`"auto"`), `"fsdp"`, `"hsdp"`, `"zero1"`, `"zero2"`, `"zero3"`; or one
            with settings: `lk.DDP(...)`, `lk.FSDP(...)`, `lk.TensorParallel(plan, ...)`; or your
            own, with `set_up(state)` that returns a `loopkit.parallel.group_ranks.GroupRanks`.
        uneven: For ranks that run out of batches in the last round: `"exact"` has them take part
            with weight 0, `"drop"` leaves the round out, `"pad"` repeats batches.
        stream: For data without numbered samples: `"split"`, each rank reads it all and keeps
            its part, or `"sharded"`, it differs on each rank already.
        timeout_s: Seconds that a rank waits for another before it gives up; until the first
            update ten minutes at least. A process group of your own keeps its timeout.

    Raises:
        UsageError: For a strategy that it does not know.
        RankError: In a step, where another rank failed.

    Example:
        >>> distributed("fsdp")
        distributed('fsdp')

    Source: https://docs.pytorch.org/docs/stable/distributed.html
    """
    name = f"distributed({strategy!r})" if strategy != "auto" else "distributed()"
    if isinstance(strategy, str):
        chosen = NAMED[one_of(name, "strategy", strategy, (*NAMED,))]
    elif isinstance(strategy, Strategy) and not callable(strategy):  # a step has set_up as well
        chosen = strategy
    else:
        raise UsageError(
            name,
            f"a strategy of type {type(strategy).__name__}",
            f"one of {', '.join(NAMED)}; or lk.DDP(...), lk.FSDP(...), lk.TensorParallel(...)",
        )
    one_of(name, "uneven", uneven, UNEVEN)
    if stream is not None:
        one_of(name, "stream", stream, STREAMS)
    owner = Parallelize(chosen, uneven, stream, positive(name, "timeout_s", timeout_s))
    layers: dict[str, Any] = {
        "around": SyncAtLast, "forward": ThroughRanks, "unscale": ShareWeights,
        "verdict": AgreeVotes, "after": LowerTimeout,
    }  # fmt: skip
    if isinstance(chosen, DDP) and chosen.shard_optimizer:
        layers["apply"] = UpdateOwnPart
    claims = ("precision",) if isinstance(chosen, FSDP) and chosen.precision else ()
    return compose(own(name=name, parallelize=owner), wrap(name=name, claims=claims, **layers))
