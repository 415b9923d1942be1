"""What shows progress on a terminal, or as lines: one display for all bars of a file."""

import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import attrs

PLAIN_EVERY_S = 10.0
NARROWEST = 6  # columns of a bar


def amount(number: float) -> str:
    """A number with few digits, by thousands.

    Example:
        >>> amount(0.123456), amount(85.2), amount(15340)
        ('0.123', '85.2', '15.3k')
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= abs(number) < limit * 1e3:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.

    Example:
        >>> clock(3725)
        '1:02:05'
    """
    minutes, secs = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{secs:02d}"


@attrs.frozen
class Shown:
    """What a bar shows.

    Attributes:
        label: What it counts, such as `epoch 3`.
        done: How many.
        total: Of how many, if that is known.
        parts: Loss, speed and the like, the most important first.
        remaining: Seconds that are left, if known.
    """

    label: str
    done: int
    total: int | None = None
    parts: tuple[str, ...] = ()
    remaining: float | None = None

    def eta(self) -> str:
        """The time that is left, in words; nothing if it is not known."""
        return "" if self.remaining is None else f"eta {clock(self.remaining)}"

    def text(self, columns: float = math.inf) -> str:
        """The parts in one line, without the last ones where it is not wide enough for all.

        Example:
            >>> Shown("epoch 0", 1, parts=("loss 0.5", "9 it/s")).text(columns=12)
            'loss 0.5'
        """
        fitting = [*self.parts]
        while len(fitting) > 1 and len(" ".join(fitting)) > columns:
            fitting.pop()
        return " ".join(fitting)


class Display(Protocol):
    """A place for one bar."""

    every_s: float

    def show(self, shown: Shown) -> None:
        """Show it as it is now."""
        ...

    def close(self) -> None:
        """Nothing more is shown."""
        ...


@attrs.define
class Lines:
    """Plain lines, where no terminal can redraw one.

    Attributes:
        file: Where to.
        nested: Whether it is part of another; then it says little.
        every_s: Seconds between two lines.
    """

    file: Any
    nested: bool = False
    every_s: float = PLAIN_EVERY_S

    def show(self, shown: Shown) -> None:
        """Write a line."""
        of = f"/{shown.total}" if shown.total else ""
        parts = [shown.label, f"step {shown.done}{of}", shown.text(), shown.eta()]
        self.file.write("  " * self.nested + "  ".join(p for p in parts if p) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing to close."""


class Screen:
    """The bars of one terminal, drawn by rich one under the other."""

    def __init__(self, file: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def cell(text: str, style: str = "") -> TextColumn:
            return TextColumn(text, style=style, table_column=Column(no_wrap=True))

        self.file, self.bars = file, 0
        self.drawn = Progress(
            cell("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(min_width=NARROWEST, ratio=1)),
            cell("{task.completed}{task.fields[of]}"),
            cell("{task.fields[text]}", "cyan"),
            cell("{task.fields[eta]}"),
            console=Console(file=file),
            auto_refresh=False,
            expand=True,
        )


_screens: list[Screen] = []  # that show something now: a terminal has one, whoever draws on it


class Bar:
    """A bar that is redrawn in place; under that of the run, while one is shown."""

    def __init__(self, file: Any, every_s: float) -> None:
        self.every_s = every_s
        file = real(file)
        found = [screen for screen in _screens if screen.file is file]
        self.screen = found[0] if found else Screen(file)
        self.nested = bool(found)
        if not found:
            _screens.append(self.screen)
            self.screen.drawn.start()
        self.screen.bars += 1
        self._task = self.screen.drawn.add_task("", total=None, of="", text="", eta="")

    def show(self, shown: Shown) -> None:
        """Redraw it."""
        label, of = "  " * self.nested + shown.label, f"/{shown.total}" if shown.total else ""
        taken = [label, "-" * NARROWEST, f"{shown.done}{of}", shown.eta()]
        left = self.screen.drawn.console.width - sum(len(cell) + 1 for cell in taken)
        self.screen.drawn.update(
            self._task,
            description=label,
            total=shown.total,
            completed=shown.done,
            of=of,
            text=shown.text(left),
            eta=shown.eta(),
            refresh=True,
        )

    def close(self) -> None:
        """Leave the last bar on the screen; remove one that was nested."""
        self.screen.bars -= 1
        if self.nested:
            self.screen.drawn.remove_task(self._task)
            self.screen.drawn.refresh()
        if not self.screen.bars:
            self.screen.drawn.stop()
            _screens.remove(self.screen)


def real(file: Any) -> Any:
    """The file behind what rich puts in the place of standard error while a bar is shown."""
    return getattr(file, "rich_proxied_file", file)


def is_fancy(file: Any) -> bool:
    """Whether bars can be drawn there: a terminal, and rich is installed."""
    return bool(real(file).isatty()) and importlib.util.find_spec("rich") is not None


@contextmanager
def aside() -> Iterator[None]:
    """Take the bars off the screen for what is written meanwhile, and draw them below it."""
    screens = [*_screens]
    for screen in screens:
        screen.drawn.live.transient = True
        screen.drawn.stop()
    try:
        yield
    finally:
        for screen in screens:
            screen.drawn.live.transient = False
            screen.drawn.start()


@attrs.define
class Pace:
    """When to show next."""

    every_s: float
    due: float = 0.0

    def is_due(self) -> bool:
        """Whether it is time, and if so, when it is next."""
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + self.every_s
        return True
