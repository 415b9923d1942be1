"""The picture of a schedule: the curve in the file is the schedule."""

import re
import sys

import loopkit as lk
import numpy as np
import pytest
from loopkit import MissingExtraError, UsageError

LR = lk.warmup(100, peak=3e-4) >> lk.cosine(900, floor=3e-5)


def curves_in(svg):
    """The curves of an SVG that matplotlib wrote, as points on the paper."""
    for path in re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #1f77b4', svg.read_text()):
        yield np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), dtype=float).T


def test_the_curve_in_the_picture_is_the_schedule(tmp_path):
    """Over its whole length, up to the scale of the paper, one panel for each name."""
    schedules = {"lr": LR, "momentum": lambda n: 0.85 + 0.1 * min(n / 300, 1)}
    svg = lk.plot_schedule(schedules, tmp_path / "schedule.svg")
    drawn = [*curves_in(svg)]
    assert len(drawn) == 2
    for (x, y), function in zip(drawn, schedules.values(), strict=True):
        values = np.array([function(n) for n in range(1001)])
        heights = np.interp(np.linspace(x[0], x[-1], 1001), x, -y)
        assert np.corrcoef(values, heights)[0, 1] > 0.99999
    assert all(f"<!-- {text} -->" in svg.read_text() for text in ("lr", "momentum", "update"))
    assert "cosine(900, floor=3e-05)" in svg.read_text()


def test_a_png_is_written_without_choosing_a_backend(tmp_path):
    """One call, one file; pyplot's global state is left alone."""
    before = sys.modules.get("matplotlib.pyplot")
    path = lk.plot_schedule(LR, str(tmp_path / "lr.png"), steps=10)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sys.modules.get("matplotlib.pyplot") is before


def test_long_schedules_are_drawn_in_few_points(tmp_path):
    """A million updates are drawn in no more points than a picture can show."""
    calls = []

    def counted(n):
        calls.append(n)
        return n

    lk.plot_schedule(counted, tmp_path / "long.png", steps=1_000_000)
    assert len(calls) <= 5000
    assert calls[0] == 0
    assert calls[-1] > 999_000


def test_matplotlib_is_an_extra(tmp_path, monkeypatch):
    """Without it the error says how it is installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        lk.plot_schedule(LR, tmp_path / "lr.png")


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    """Nothing to draw, or no end to draw to, is told with what to write."""
    for nothing in ({}, {"lr": 3e-4}):
        with pytest.raises(UsageError, match="several by name"):
            lk.plot_schedule(nothing, tmp_path / "lr.png")
    with pytest.raises(UsageError, match="steps=1000"):
        lk.plot_schedule(lk.constant(value=1.0), tmp_path / "lr.png")
    with pytest.raises(UsageError, match="steps = 0"):
        lk.plot_schedule(LR, tmp_path / "lr.png", steps=0)
