"""A run that can be asked to stop: by a signal, or by its time."""

import signal
import time
from collections.abc import Generator, Iterable
from typing import Any

import attrs
from loguru import logger

from loopkit.checkpoint.checkpointer import Checkpointer
from loopkit.errors import Preempted, UsageError
from loopkit.interrupt import Notice, in_main_thread
from loopkit.limits import Time, seconds
from loopkit.state import TrainState
from loopkit.updates import Adapted

TIME_IS_UP = 14  # SIGALRM, which not every system has
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)


@attrs.define(eq=False)
class Preemption:
    """What may ask a run to stop; while its loop lasts it is found at `state.preemption`.

    Attributes:
        checkpoints: Where the last state goes.
        notice: The signals.
        deadline: When the time is up, by `time.monotonic()`.
        state: The state that the run gave last.
        saved: Whether that is saved.
        asked: What all ranks have agreed to stop for; 0 if for nothing.
        over: Whether the loop has ended; a copy of its state may still know of this.
    """

    checkpoints: Checkpointer
    notice: Notice
    deadline: float | None
    state: TrainState | None = None
    saved: bool = False
    asked: int = 0
    over: bool = False
    _mark: tuple[Any, ...] = ()

    @property
    def requested(self) -> int:
        """The signal that asked to stop; 0 if there was none. All ranks see the same."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        signum = self.notice.signum or (TIME_IS_UP if late else 0)
        return signum if self.state is None else self.state.ranks.agree(signum)

    def poll(self) -> None:
        """Raise `Preempted` if the run is to stop; whoever lets it out calls `save` before."""
        if self.over:
            return
        self.asked = self.requested
        if self.asked:
            stop = Preempted(self.asked)
            raise stop

    def save(self) -> None:
        """Save the state that the run gave last, once, and wait for it."""
        if self.state is not None and not self.saved and not self.notice.hurried:
            self.checkpoints.ensure(self.state)
            self.saved = True
            logger.info("stopped at step {}, which is saved", self.state.step)

    def watch(self, state: TrainState) -> None:
        """Let evaluations of this state be stopped, too."""
        if self.state is not state:
            self.forget()
        self.state, state.preemption, self.saved = state, self, False
        self._mark = _mark_of(state)

    def is_between_updates(self) -> bool:
        """Whether nothing has been done to the state since the run gave it.

        Never so for several ranks: what one of them finds the others may not.
        """
        alone = self.state is not None and self.state.ranks.size == 1
        return alone and self._mark == _mark_of(self.state)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Let go of the state; its evaluations are no longer stopped."""
        if self.state is not None:
            self.state.preemption = None
        self.state = None

    def end(self) -> None:
        """Save the last state if a signal came, in a loop that is left for another reason.

        Several ranks save together, so not where one of them left at a signal of its own.
        """
        alone = self.state is not None and self.state.ranks.alone
        if self.asked or (self.notice.signum and alone):
            self.save()


def _mark_of(state: TrainState) -> tuple[Any, ...]:
    """What changes when an update or an epoch begins; each update has an outcome of its own."""
    return id(state.outcome), state.step, state.epoch, state.batch


class Preemptible(Adapted):
    """The states of a run that can be asked to stop; made by `preemptible`."""

    def __init__(self, run: Iterable[TrainState], preemption: Preemption) -> None:
        super().__init__(run, _watched(run, preemption))


def preemptible(
    run: Iterable[TrainState],
    checkpoints: Checkpointer,
    *,
    signals: Iterable[int] = SIGNALS,
    max_time: Time | None = None,
) -> Preemptible:
    """The states of a run that saves itself and ends when a signal asks for it, or its time is up.

    `for state in preemptible(run(...), checkpoints): ...`; the signal only sets a flag. The
    update that is under way is finished, and the loop's body with it; then the state is saved,
    unless the body did, and `Preempted` is raised: a `SystemExit`, which ends the process with
    code 128 + signal (SIGTERM 143, SIGUSR1 138, SIGINT 130; SIGALRM, 142, where it was the
    time). `evaluate` stops between two batches, in the same way; the run that goes on begins
    with the next update, so what this body had still to do is not made up for.
    A second signal, a second or more after the first, acts at once, as it would have without.
    A `break` of the body ends the loop, and nothing else; the state is saved if a signal came.

    To put a job back into the queue, look at its exit code, or catch `Preempted`. SLURM sends
    SIGUSR1 a minute before the limit by `#SBATCH --signal=USR1@60`, and after
    `srun python train.py` this puts it back: `[ $? -eq 138 ] && scontrol requeue $SLURM_JOB_ID`.

    Args:
        run: A run, or any iterator of states.
        checkpoints: Where to save.
        signals: What asks to stop; what handled them before does so again after the loop.
        max_time: Seconds, a timedelta, "DD:HH:MM:SS" or `{"hours": 2}`, from now on: what
            the job's limit leaves for an update and a save.

    Returns:
        An iterator, and context manager, with the run's `.total_steps`.

    Raises:
        UsageError: For signals in a thread other than the main one, or a time that is none.
        Preempted: While it is iterated.
        CheckpointError: While it is iterated, if the last save failed.

    Example:
        >>> import tempfile, torch
        >>> from loopkit.run import run
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> updates = run(lambda state, x: state.model(x).mean(), state, [torch.ones(4, 2)])
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
        ...     try:
        ...         for state in preemptible(updates, checkpoints):
        ...             if state.step == 3:
        ...                 signal.raise_signal(signal.SIGTERM)
        ...     except Preempted as stop:
        ...         stop.code, checkpoints.latest
        (143, Checkpoint(step=3))
    """
    deadline = None if max_time is None else time.monotonic() + seconds(max_time)
    signals = (*signals,)
    if signals and not in_main_thread():
        raise UsageError(
            "preemptible(run, checkpoints)",
            "a thread other than the main one, where Python lets no signal be handled",
            "the loop in the main thread; or signals=(), with a max_time",
        )
    return Preemptible(run, Preemption(checkpoints, Notice(signals), deadline))


# A function, as a generator that held its `Preemptible` would be a cycle; see `Saving`.
def _watched(run: Iterable[TrainState], preemption: Preemption) -> Generator[TrainState]:
    with preemption.notice:
        try:
            for state in run:
                preemption.watch(state)
                yield state
                preemption.poll()
            preemption.poll()  # it came after the last update: what follows the loop can wait
        except Preempted:
            preemption.save()
            _close(run)
            raise
        except Exception:
            # Data workers died of the same signal, before the batch of the next update was there
            if not preemption.is_between_updates():
                raise
            preemption.end()
            preemption.poll()
            raise
        except GeneratorExit:  # a break, or an error of the body
            preemption.end()
            raise
        finally:
            preemption.over = True
            preemption.forget()


def _close(run: Iterable[TrainState]) -> None:
    if hasattr(run, "close"):
        run.close()
