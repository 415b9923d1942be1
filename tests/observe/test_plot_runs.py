"""Plots: the curves that were logged, in the picture."""

import json

import loopkit as lk
import pytest
from loopkit.observe import plot as plotting

from problems import classifier, make_batches, make_state


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(folder, scale=1.0):
    return write(
        folder,
        [
            {"step": n, "time": 60.0 * n, "samples": 8 * n, "loss": scale / n, "lr": 0.1}
            for n in range(1, 9)
        ]
        + [{"step": 8, "time": 480.0, "val/loss": scale / 4, "note": "text"}],
    )


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn, to look into."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    return lambda: {axis.get_title(): axis for axis in drawn[-1].axes}


def points(axis):
    return {line.get_label(): [*map(list, line.get_data())] for line in axis.get_lines()}


def test_a_run_that_was_logged_is_drawn(tmp_path, figure):
    """From CSV or JSONL alike: a panel has the numbers that were logged, at their updates."""
    for name in ("jsonl", "csv"):
        losses = []
        with lk.Log(tmp_path / name, name) as log:
            run = lk.run(classifier, make_state(), make_batches(), max_epochs=2)
            losses = [float(s.loss) for s in log.wrap(run, every=1)]
        path = lk.plot(tmp_path / name)
        assert path == tmp_path / name / "curves.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        (line,) = points(figure()["loss"]).values()
        assert line == [[*map(float, range(1, 15))], losses]


def test_training_and_validation_share_a_panel_and_runs_have_colours(tmp_path, figure):
    """`loss` and `val/loss` are one panel; each run has its colour, each metric its dashes."""
    lk.plot([curve(tmp_path / "a"), curve(tmp_path / "b", 2.0)], tmp_path / "both.png")
    axes = figure()
    assert [*axes] == ["loss", "lr"]
    assert [*points(axes["loss"])] == ["a loss", "a val/loss", "b loss", "b val/loss"]
    lines = axes["loss"].get_lines()
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


@pytest.mark.parametrize(("x", "last"), [("samples", 64.0), ("time", 7.0), ("step", 8.0)])
def test_the_axis_may_be_samples_or_minutes(tmp_path, figure, x, last):
    """As asked for; minutes count from the run's first record."""
    lk.plot(curve(tmp_path / "a"), metrics=["loss"], x=x)
    ((xs, _),) = points(figure()["loss"]).values()
    assert xs[-1] == last


def test_smoothing_starts_without_a_pull(tmp_path, figure):
    """The average is a weighted mean of the points so far; the first is the first."""
    rows = [{"step": n, "loss": 1 / n, "lr": 0.1 / n} for n in range(1, 41)]
    lk.plot(write(tmp_path / "a", rows), smooth=0.5)
    assert len(figure()["lr"].get_lines()) == 1  # no noise, nothing to smooth
    raw, smooth = (line.get_data()[1] for line in figure()["loss"].get_lines())
    assert smooth[0] == raw[0]
    assert smooth[1] == pytest.approx((0.5 * raw[0] + raw[1]) / 1.5)


def test_what_is_not_finite_is_marked(tmp_path, figure):
    """NaN leaves a gap with a cross, rather than nothing at all."""
    write(tmp_path / "a", [{"step": n, "loss": "NaN" if n == 3 else 1.0} for n in range(1, 6)])
    lk.plot(tmp_path / "a")
    marks = [line for line in figure()["loss"].get_lines() if line.get_marker() == "x"]
    assert [*marks[0].get_data()[0]] == [3.0]


def test_runs_of_one_name_are_told_apart_by_their_folders():
    """The shortest ends of the paths that differ."""
    from pathlib import Path

    assert [*plotting._labels([Path("x/a/run"), Path("x/b/run")])] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("settings", "found", "instead"),
    [({"metrics": ["los"]}, "no 'los'", "'loss'"), ({"x": "steps"}, "x = 'steps'", "'step'"),
     ({"smooth": 2}, "smooth = 2", "from 0 to 1")],
)  # fmt: skip
def test_a_wrong_use_is_an_error_that_teaches(tmp_path, settings, found, instead):
    """It names what was found, and the nearest that there is."""
    with pytest.raises(lk.UsageError) as caught:
        lk.plot(curve(tmp_path / "a"), **settings)
    assert found in caught.value.found
    assert instead in caught.value.instead


def test_a_folder_without_records_is_an_error(tmp_path):
    """It says where it looked."""
    with pytest.raises(lk.UsageError, match=r"metrics\.jsonl"):
        lk.plot(tmp_path)
