"""The benchmark for CUDA devices, whose every line but the measuring runs on a CPU."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTIONS = [
    "## GPT-2 124M: tokens a second",
    "## A tiny model as one CUDA graph",
    "## Host waits",
    "## Peak memory",
    "## What `run` adds",
]


def benchmark(*words):
    """Run the script on the CPU with sizes that mean nothing."""
    line = [sys.executable, "benchmarks/cuda.py", "--device", "cpu", "--tiny", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def results():
    return {p.name: p.stat().st_mtime_ns for p in (ROOT / "benchmarks" / "results").iterdir()}


def test_each_section_runs_and_writes_nothing():
    """All five tables are shown, both trainings end in equal weights, and no result is written."""
    before = results()
    done = benchmark()
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert shown == SECTIONS
    last = done.stdout[done.stdout.index(SECTIONS[-1]) :].splitlines()
    rows = [line.split("|")[1:-1] for line in last if line.startswith("| ")][1:]
    assert [(row[0].strip(), row[-1].strip()) for row in rows] == [
        ("plain", "0.0e+00"), ("full", "0.0e+00"), ("noise", "0.0e+00"),
    ]  # fmt: skip
    assert results() == before


def test_figures_of_a_cpu_cannot_be_written():
    """--write is refused there, before anything is measured."""
    before = results()
    done = benchmark("--write")
    assert done.returncode == 2
    assert "--write is for what was measured on a CUDA device" in done.stderr
    assert results() == before
