"""The log of a run: what is logged once goes to several places."""

import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from loopkit.check import near
from loopkit.closing import Closing
from loopkit.errors import UsageError
from loopkit.every import Every, Interval, Moment
from loopkit.observe.console import Console
from loopkit.observe.delivery import Delivery, Guarded
from loopkit.observe.fetch import fetch
from loopkit.observe.files import CSV, JSONL
from loopkit.observe.record import Record, flat
from loopkit.observe.sink import Function, Opening, Sink
from loopkit.observe.trackers import MLflow, TensorBoard, WandB
from loopkit.ranks import is_main_rank
from loopkit.state import TrainState
from loopkit.updates import Adapted, check_updates

NAMED: dict[str, Callable[[], Sink]] = {
    "console": Console,
    "csv": CSV,
    "jsonl": JSONL,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}

Written = Sink | Callable[[Record], Any] | str
Extra = Callable[[TrainState], Mapping[str, Any]]


class Log(Closing):
    """Logs numbers of a run to files and trackers, all by one call.

    `log(state)` logs `state.metrics`; `log(state, **scores)` logs what you name. Numbers on a
    device are copied in the background and written when they have arrived, so that logging
    never waits for the device. One rank writes; on others it does nothing. A sink that fails
    is told once, and the run goes on. Text is escaped to one line, and what is named or looks
    like a secret is left out; the environment, the command line and tracebacks are never logged.

    A resumed run drops the records of updates that it makes again, so that curves do not double;
    a run from the start gives the files of an earlier one another name.

    Args:
        dir: The folder of the run; made at the first record.
        *sinks: `JSONL()` if none is given; or `CSV()`, `TensorBoard()`, `WandB(...)`,
            `MLflow(...)`, `Console()`, their names (`"csv"`), a `Sink` of your own, or any
            function of a `Record`.
        config: Settings of the run, logged once: a mapping, a namespace, an attrs or data
            class. Nested as you like; secrets are left out.

    Attributes:
        sinks: Where it writes.

    Raises:
        UsageError: For a sink that there is not.
        MissingExtraError: For one whose package is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> import torch
        >>> state = TrainState(torch.nn.Linear(2, 1))
        >>> with Log(folder, "csv", config={"lr": 0.1, "api_key": "secret"}) as log:
        ...     log(state, **{"val/loss": 0.5})
        >>> (folder / "metrics.csv").read_text().splitlines()[0]
        'step,epoch,samples,time,val/loss'
        >>> (folder / "config.json").read_text()
        '{"lr": 0.1, "api_key": "[redacted]"}'
    """

    def __init__(self, dir: str | Path, /, *sinks: Written, config: Any = None) -> None:  # noqa: A002
        self.dir = Path(dir)
        self._delivery = Delivery([Guarded(_sink(sink)) for sink in sinks or ("jsonl",)])
        self._config = {} if config is None else flat(config)
        self._kept: int | None = None
        # When it is dropped, or the process ends: whoever forgets to close it loses nothing.
        self._finalizer = weakref.finalize(self, self._delivery.close)

    def __repr__(self) -> str:
        return f"Log({str(self.dir)!r}, {', '.join(map(repr, self.sinks))})"

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Where it writes."""
        return tuple(guarded.sink for guarded in self._delivery.sinks)

    @property
    def lost(self) -> int:
        """Records that a sink could not take, over all sinks."""
        return sum(guarded.lost for guarded in self._delivery.sinks)

    def __call__(self, state: TrainState, /, *unnamed: Any, **values: Any) -> None:
        """Log values at the state's update; without any, `state.metrics`.

        Args:
            state: Whose clock the record has.
            *unnamed: None: a value without a name is an error.
            **values: Numbers, text, or tensors of one element, on any device; a name may
                hold slashes (`**{"val/loss": loss}`), which trackers show as groups.

        Raises:
            UsageError: For a value that is none of these, or a log that was closed.
        """
        self._check(state, unnamed)
        if not is_main_rank():
            return
        fetched = fetch("log(state, ...)", values or state.metrics)
        if self._delivery.opening is None:
            self._delivery.opening = self._opening(state)
        record = Record(state.step, state.epoch, state.samples, time.time(), {})
        self._delivery.add(record, fetched)

    def wrap(
        self,
        run: Iterable[TrainState],
        *,
        every: Interval = 50,
        first: bool = False,
        extras: Iterable[Extra] = (),
    ) -> Adapted:
        """The states of `run`; every so often `state.metrics` are logged on the way.

        Args:
            run: A run, or any iterator of states.
            every: How often: updates (50), time ("10s"), or "epoch".
            first: Log the first update of the run as well.
            extras: Functions of the state that give more to log, such as `lk.learning_rates`.

        Raises:
            UsageError: For what is no interval, or no run.
        """
        check_updates("Log.wrap", run)
        state = getattr(run, "state", None)
        if state is not None and self._kept is None:
            self._kept = state.step or -1  # what follows goes on from here
        return Adapted(
            run,
            _logged(
                run, self, Every.of(every, f"log.wrap(run, every={every!r})"), first, tuple(extras)
            ),
        )

    def flush(self) -> None:
        """Write what was logged, waiting for the device; return when it is on disk."""
        self._delivery.flush()

    def close(self) -> None:
        """Write what was logged, and close the sinks."""
        self._finalizer()

    def _check(self, state: object, unnamed: tuple[Any, ...]) -> None:
        if unnamed:
            raise UsageError(
                "log(state, ...)",
                f"a {type(unnamed[0]).__name__} without a name",
                "log(state, loss=loss), or of a mapping log(state, **scores)",
            )
        if not isinstance(state, TrainState):
            raise UsageError(
                "log(state, ...)", f"a {type(state).__name__} as the state", "log(state, loss=loss)"
            )
        if not self._finalizer.alive:
            raise UsageError(
                "log(state, ...)", "a log that was closed", "a new lk.Log, or close it later"
            )

    def _opening(self, state: TrainState) -> Opening:
        restored = getattr(state.checkpoints, "restored", None)
        if restored is not None and restored.checkpoint.step <= state.step:
            kept = restored.checkpoint.step
        else:
            kept = self._kept if self._kept is not None else state.step - 1 or -1
        return Opening(self.dir, self._config, kept)


def _logged(
    run: Iterable[TrainState], log: Log, every: Every, first: bool, extras: tuple[Extra, ...]
) -> Generator[TrainState]:
    begun = getattr(run, "state", None)
    since = None if begun is None else Moment.of(begun)
    for state in run:
        due, since = every(state, since), Moment.of(state)  # `run` may yield once for many updates
        if first or due:
            first = False
            more = {name: value for extra in extras for name, value in extra(state).items()}
            log(state, **state.metrics, **more)
        yield state
    log.flush()


def _sink(written: object) -> Sink:
    call = f"Log(dir, {written!r:.60})"
    if isinstance(written, str):
        if written not in NAMED:
            raise UsageError(call, f"a sink {written!r}", near(written, NAMED))
        written = NAMED[written]()
    if isinstance(written, type):
        raise UsageError(call, "a class", f"an object of it: {written.__name__}()")
    if isinstance(written, Sink):
        return written
    if callable(getattr(written, "write", None)) and callable(getattr(written, "open", None)):
        return written  # type: ignore[return-value]
    if callable(written):
        return Function(written)
    raise UsageError(call, f"a {type(written).__name__}", "a sink, such as lk.CSV(), or its name")
