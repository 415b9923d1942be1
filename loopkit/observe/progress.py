"""A progress bar round a run."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import attrs

from loopkit.check import positive
from loopkit.state import TrainState

PLAIN_EVERY_S = 10.0


@attrs.define
class Rates:
    """Updates and samples per second, by wall time, from after the first update."""

    started: float | None = None
    step: int = 0
    samples: int = 0

    def of(self, state: TrainState, now: float) -> tuple[float, float]:
        """Updates and samples per second so far; zeros at the first call, which starts the clock.

        The first update is slow for reasons of its own (compiling, growing memory), and an
        estimate that counted it would promise too little for long.
        """
        if self.started is None:
            self.started, self.step, self.samples = now, state.step, state.samples
            return 0.0, 0.0
        passed = max(now - self.started, 1e-9)
        return (state.step - self.step) / passed, (state.samples - self.samples) / passed


def amount(number: float) -> str:
    """A number with few digits, by thousands.

    Example:
        >>> amount(0.123456), amount(85.2), amount(15340)
        ('0.123', '85.2', '15.3k')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{number:.3g}"


def facts(state: TrainState, rates: tuple[float, float]) -> str:
    """Loss, learning rate and speed of the state, in words; this waits for the device."""
    parts = [f"loss {amount(state.loss.item())}"]
    if state.lr is not None:
        parts.append(f"lr {amount(float(state.lr))}")
    if rates[0]:
        parts.append(f"{amount(rates[0])} it/s")
        parts.append(f"{amount(rates[1])} samples/s")
    return " ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.

    Example:
        >>> clock(3725)
        '1:02:05'
    """
    minutes, secs = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{secs:02d}"


class Display(Protocol):
    """What shows the progress: a bar or lines."""

    def show(self, state: TrainState, text: str, remaining: float | None) -> None:
        """Show the state as it is now."""
        ...


@attrs.define
class Lines(AbstractContextManager["Lines"]):
    """Plain lines, where no terminal can redraw one."""

    file: Any
    total: int | None

    def __exit__(self, *exception: object) -> None:
        """Nothing to close."""

    def show(self, state: TrainState, text: str, remaining: float | None) -> None:
        """Write a line."""
        of = f"/{self.total}" if self.total else ""
        eta = "" if remaining is None else f"  eta {clock(remaining)}"
        self.file.write(f"epoch {state.epoch}  step {state.step}{of}  {text}{eta}\n")
        self.file.flush()


class Bar(AbstractContextManager["Bar"]):
    """A bar that is redrawn in place, by rich."""

    def __init__(self, file: Any, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.fields[of]}"),
            TextColumn("{task.fields[text]}", style="cyan"),
            TextColumn("{task.fields[eta]}"),
            console=Console(file=file),
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=total, of=total or "?", epoch=0, text="", eta=""
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, state: TrainState, text: str, remaining: float | None) -> None:
        """Redraw the bar."""
        eta = "" if remaining is None else clock(remaining)
        self._progress.update(
            self._task, completed=state.step, epoch=state.epoch, text=text, eta=eta, refresh=True
        )


def progress(
    updates: Iterable[TrainState], *, every_s: float = 0.2, file: Any = None
) -> Iterator[TrainState]:
    """Show how far a run is: epoch, step, loss, learning rate, speed, and the time that is left.

    A bar on a terminal (with rich installed), else a line every ten seconds. The loss is
    read when it is shown, which waits for the device, so at most every `every_s` seconds.

    Args:
        updates: A run, or any iterator of states.
        every_s: Seconds between two redraws of the bar.
        file: Where it is shown; standard error by default.

    Yields:
        The states of `updates`, as they are.

    Raises:
        UsageError: If `every_s` is not above 0.

    Example:
        >>> list(progress([]))
        []
    """
    positive(f"progress(every_s={every_s})", "every_s", every_s)
    file = file or sys.stderr
    total = getattr(updates, "total_steps", None)
    fancy = file.isatty() and importlib.util.find_spec("rich") is not None
    display = Bar(file, total) if fancy else Lines(file, total)
    return _shown(updates, display, every_s if fancy else PLAIN_EVERY_S, total)


def _shown(
    updates: Iterable[TrainState], display: Bar | Lines, every_s: float, total: int | None
) -> Iterator[TrainState]:
    rates, due, state, shown = Rates(), 0.0, None, -1
    with display:
        try:
            for state in updates:
                now = time.monotonic()
                if now >= due:
                    _show(display, state, rates.of(state, now), total)
                    due, shown = now + every_s, state.step
                yield state
        finally:
            if state is not None and shown != state.step:
                _show(display, state, rates.of(state, time.monotonic()), total)


def _show(
    display: Display, state: TrainState, speed: tuple[float, float], total: int | None
) -> None:
    remaining = (total - state.step) / speed[0] if total and speed[0] else None
    display.show(state, facts(state, speed), remaining)
