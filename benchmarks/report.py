"""What the result files have in common: where, with what, of which commit."""

import contextlib
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def about(*packages: str) -> str:
    """Day, commit, hardware and versions, in a line."""
    commit = _git("rev-parse", "--short", "HEAD") + " and changes" * bool(
        _git("status", "--porcelain", "--", "loopkit")
    )
    versions = []
    for name in ("torch", *packages):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, commit {commit}, {os.cpu_count()} cores"
        f" ({names[0] if names else platform.machine()}), load {os.getloadavg()[0]:.1f},"
        f" Python {platform.python_version()}; {', '.join(versions)}."
    )


def _git(*words: str) -> str:
    root = Path(__file__).parents[1]
    line = ["git", *words]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower, the median, the upper."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def table(head: str, *rows: str) -> list[str]:
    """A table in Markdown."""
    return [head, "|" + "---|" * (head.count("|") - 1), *rows]


def show(name: str, text: str, lines: Sequence[str], *, write: bool) -> None:
    """Print the lines, and write them to `results/<name>.md` below what `text` says.

    Args:
        name: The script's.
        text: A title, and how to read it, with the goals.
        lines: What was found.
        write: Whether to write it.
    """
    print("\n".join(lines))
    if write:
        made = f"Made by `python benchmarks/{name}.py --write`, which says how; {about()}"
        parts = [text.strip(), "", made, "", *lines, ""]
        (RESULTS / f"{name}.md").write_text("\n".join(parts))
