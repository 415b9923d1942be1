"""For each way of observing that other trainers have: what one writes here, run and checked.

`ROWS` is the table's text: "you used", "you write". Each snippet runs as it stands, on a small
classifier, and then its own check looks at what it left behind.
"""

import csv
import json
import shutil
import textwrap

import loopkit as lk
import pytest
import torch
from loguru import logger
from torch import nn
from torch.nn import functional as F

from problems import make_batches

ROWS = {
    "Lightning logger=CSVLogger(...)": """
        with lk.Log("runs/a", lk.CSV()) as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=2), every=5):
                ...
    """,
    "Lightning logger=TensorBoardLogger(...), default_root_dir": """
        with lk.Log("runs/a", lk.TensorBoard()) as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=2), every=5):
                ...
    """,
    "Lightning logger=[several]; HF report_to=[...]": """
        with lk.Log("runs/a", "tensorboard", "csv", lk.JSONL("all.jsonl")) as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=2), every=5):
                ...
    """,
    "HF report_to='none'; Lightning logger=False": """
        for state in lk.run(train_step, state, loader, max_epochs=2):
            ...
    """,
    "Lightning self.log(...), self.log_dict(...); HF trainer.log": """
        with lk.Log("runs/a") as log:
            for state in lk.run(train_step, state, loader, max_epochs=2):
                log(state, loss=state.loss, seen=state.samples)
                if state.epoch_end:
                    scores = lk.evaluate(eval_step, state, val_loader)
                    log(state, **{f"val/{name}": score for name, score in scores.items()})
    """,
    "Lightning log_every_n_steps; HF logging_strategy='steps', logging_steps": """
        with lk.Log("runs/a") as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=2), every=3):
                ...
    """,
    "HF logging_strategy='epoch', logging_first_step=True": """
        with lk.Log("runs/a") as log:
            run = lk.run(train_step, state, loader, max_epochs=2)
            for state in log.wrap(run, every="epoch", first=True):
                ...
    """,
    "Lightning logger.log_hyperparams, save_hyperparameters()": """
        with lk.Log("runs/a", config={"lr": 0.1, "hub_token": "secret"}) as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=1), every=1):
                ...
    """,
    "Lightning enable_progress_bar, RichProgressBar, TQDMProgressBar": """
        for state in lk.progress(lk.run(train_step, state, loader, max_epochs=2), file=shown):
            if state.epoch_end:
                lk.evaluate(eval_step, state, lk.bar(val_loader, "val", file=shown))
    """,
    "Lightning log(..., prog_bar=True)": """
        run = lk.run(train_step, state, loader, max_epochs=2)
        for state in lk.progress(run, show=["accuracy"], file=shown):
            ...
    """,
    "Lightning LearningRateMonitor(log_momentum=True), DeviceStatsMonitor()": """
        with lk.Log("runs/a") as log:
            for state in lk.run(train_step, state, loader, max_epochs=2):
                log(state, **lk.learning_rates(state, "momentum"), **lk.device_stats(state))
    """,
    "Lightning enable_model_summary, ModelSummary(max_depth=2)": """
        found = lk.summary(model, inputs, depth=2)
        print(found, file=shown)
    """,
    "Lightning profiler='simple'": """
        timing = lk.Timing()
        for state in timing(lk.run(timing(train_step), state, loader, max_epochs=2)):
            ...
        print(timing, file=shown)
    """,
    "Lightning profiler='advanced'": """
        run = lk.run(train_step, state, loader, max_epochs=2)
        for state in lk.profile(run, "runs/a", kind="python"):
            ...
    """,
    "Lightning profiler='pytorch'": """
        run = lk.run(train_step, state, loader, max_epochs=2)
        for state in lk.profile(run, "runs/a", wait=1, warmup=1, active=3):
            ...
    """,
    "Lightning ThroughputMonitor; HF include_tokens_per_second": """
        run = lk.throughput(
            lk.run(train_step, state, loader, max_epochs=2), flops="count", peak_flops=1e12
        )
        with lk.Log("runs/a") as log:
            for state in log.wrap(run, every=1):
                ...
    """,
    "HF logging to the console (PrinterCallback)": """
        with lk.Log("runs/a", lk.Console()) as log:
            for state in log.wrap(lk.run(train_step, state, loader, max_epochs=1), every=7):
                ...
    """,
    "a Callback of your own (on_train_batch_end)": """
        @lk.adaptor
        def remember(updates, losses):
            for state in updates:
                losses.append(state.loss)
                yield state

        losses = []
        for state in lk.progress(
            remember(lk.run(train_step, state, loader, max_epochs=2), losses), file=shown
        ):
            ...
    """,
    "curves of several runs in one picture": """
        for name in ("runs/a", "runs/b"):
            with lk.Log(name) as log:
                run = lk.run(train_step, lk.TrainState(model, optimizer), loader, max_epochs=2)
                for state in log.wrap(run, every=1):
                    ...
        lk.plot(["runs/a", "runs/b"], "runs/both.png", metrics=["loss"], smooth=0.6)
    """,
}


class Shown(list):
    """A file that keeps what is written to it."""

    write = list.append

    def flush(self):
        pass

    def isatty(self):
        return False

    def text(self):
        return "".join(self)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a row's snippet in a folder of its own, and gives back its names."""
    monkeypatch.chdir(tmp_path)

    def run(row):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def train_step(state, batch):
            logits = state.model(batch[0])
            accuracy = (logits.argmax(-1) == batch[1]).float().mean()
            return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": accuracy}

        names = {
            "lk": lk, "model": model, "optimizer": optimizer, "train_step": train_step,
            "state": lk.TrainState(model, optimizer), "loader": make_batches(7),
            "val_loader": make_batches(3), "inputs": torch.zeros(2, 4), "shown": Shown(),
            "eval_step": lambda s, b: F.cross_entropy(s.model(b[0]), b[1]),
        }  # fmt: skip
        exec(textwrap.dedent(ROWS[row]), names)  # noqa: S102 - it is the table's own text
        return names

    yield run
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def lines(path):
    with open(path) as file:  # noqa: PTH123
        return [json.loads(line) for line in file]


def steps(path):
    return [row["step"] for row in lines(path)]


def row_that(starts):
    (row,) = [row for row in ROWS if row.startswith(starts)]
    return row


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder)
    found.Reload()
    return [event.step for event in found.Scalars(name)]


def test_csv(ran):
    """The loss of every fifth update is in the table."""
    ran(row_that("Lightning logger=CSVLogger"))
    with open("runs/a/metrics.csv", newline="") as file:  # noqa: PTH123
        assert [(row["step"], bool(row["loss"])) for row in csv.DictReader(file)] == [
            ("5", True), ("10", True),
        ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(ran):
    """Its reader finds every fifth update."""
    ran(row_that("Lightning logger=TensorBoardLogger"))
    assert scalars("runs/a", "loss") == [5, 10]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_several(ran):
    """All three have the same updates."""
    ran(row_that("Lightning logger=[several]"))
    with open("runs/a/metrics.csv", newline="") as file:  # noqa: PTH123
        assert [int(row["step"]) for row in csv.DictReader(file)] == [5, 10]
    assert steps("runs/a/all.jsonl") == scalars("runs/a", "loss") == [5, 10]


def test_none(ran, tmp_path):
    """No file is made."""
    ran(row_that("HF report_to='none'"))
    assert [*tmp_path.iterdir()] == []


def test_log_by_hand(ran):
    """Each update, and the evaluation of each epoch, equal to one made again."""
    names = ran(row_that("Lightning self.log"))
    rows = lines("runs/a/metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 8), 7, *range(8, 15), 14]
    assert (
        rows[-1]["val/loss"]
        == lk.evaluate(names["eval_step"], names["state"], names["val_loader"])["loss"]
    )
    assert rows[0]["seen"] == 5


def test_every_n_steps(ran):
    """Steps 3, 6, ..., whatever the epochs."""
    ran(row_that("Lightning log_every_n_steps"))
    assert steps("runs/a/metrics.jsonl") == [3, 6, 9, 12]


def test_every_epoch_and_first(ran):
    """The first update, then the ends of the epochs."""
    ran(row_that("HF logging_strategy='epoch'"))
    assert steps("runs/a/metrics.jsonl") == [1, 7, 14]


def test_hyperparameters(ran):
    """Written once, without the secret."""
    ran(row_that("Lightning logger.log_hyperparams"))
    with open("runs/a/config.json") as file:  # noqa: PTH123
        assert json.load(file) == {"lr": 0.1, "hub_token": "[redacted]"}


def test_progress_bar(ran):
    """The first and the last update are shown."""
    names = ran(row_that("Lightning enable_progress_bar"))
    text = names["shown"].text().splitlines()
    assert "step 1/14" in text[0]
    assert "step 14/14" in text[-1]


def test_metrics_in_the_bar(ran):
    """The accuracy that the step returned is shown."""
    names = ran(row_that("Lightning log(..., prog_bar=True)"))
    accuracy = float(names["state"].metrics["accuracy"])
    assert f"accuracy {accuracy:.3g}" in names["shown"].text().splitlines()[-1]


def test_monitors(ran):
    """Each row has rate, momentum and memory."""
    ran(row_that("Lightning LearningRateMonitor"))
    for row in lines("runs/a/metrics.jsonl"):
        assert (row["lr/0"], row["momentum/0"]) == (0.1, 0.9)
        assert row["device/memory_gib"] > 0


def test_model_summary(ran):
    """15 parameters, 2 * 2 * 4 * 3 FLOPs."""
    names = ran(row_that("Lightning enable_model_summary"))
    assert (names["found"].parameters, names["found"].flops) == (15, 48)
    assert "15 parameters" in names["shown"].text()


def test_simple_profiler(ran):
    """All parts have their share."""
    names = ran(row_that("Lightning profiler='simple'"))
    assert names["timing"].updates == 13
    assert all(seconds > 0 for seconds in names["timing"].seconds.values())
    assert "backward" in names["shown"].text()


def test_advanced_profiler(ran):
    """The step function is listed with its 14 calls."""
    ran(row_that("Lightning profiler='advanced'"))
    with open("runs/a/profile.txt") as file:  # noqa: PTH123
        (line,) = [line for line in file if "(train_step)" in line]
    assert line.split()[0] == "14"


def test_pytorch_profiler(ran, tmp_path):
    """One trace of three updates."""
    ran(row_that("Lightning profiler='pytorch'"))
    (path,) = tmp_path.glob("runs/a/trace-*.json")
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3


def test_throughput(ran):
    """From the second update on, speed and utilisation are logged."""
    ran(row_that("Lightning ThroughputMonitor"))
    rows = lines("runs/a/metrics.jsonl")
    assert "samples_per_s" not in rows[0]
    assert all(row["samples_per_s"] > 0 and 0 < row["mfu"] < 1 for row in rows[1:])


def test_console(ran):
    """A line in the program's own log."""
    caught = []
    handler = logger.add(caught.append, format="{message}")
    try:
        ran(row_that("HF logging to the console"))
    finally:
        logger.remove(handler)
    assert [line.split("  ")[0] for line in caught] == ["step 7"]


def test_callback(ran):
    """It saw each update, and the bar outside of it still knows the total."""
    names = ran(row_that("a Callback of your own"))
    assert len(names["losses"]) == 14
    assert "step 14/14" in names["shown"].text()


def test_curves(ran, tmp_path):
    """A picture of both runs."""
    ran(row_that("curves of several runs"))
    assert (tmp_path / "runs" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_each_row_has_a_test():
    """No row of the table is without a check of its own."""
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(tests) - 1 == len(ROWS)
