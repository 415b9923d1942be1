"""The log: one call, several sinks, and nothing that it could cost the run."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace

import attrs
import loopkit as lk
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loguru import logger
from loopkit.observe.delivery import MOST_WAITING
from loopkit.observe.fetch import Fetched, fetch
from loopkit.observe.record import redacted, redacted_text

from forked import STARTER
from problems import classifier, make_batches, make_state


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def at(step, state=None):
    state = state or make_state()
    state.step = step
    return state


# What is logged


def test_one_call_goes_to_every_sink(tmp_path):
    """A call writes the same record as JSON, as CSV, and to a function, at the state's clock."""
    seen, state = [], make_state()
    with lk.Log(tmp_path, "jsonl", lk.CSV(), seen.append) as log:
        for state in lk.run(classifier, state, make_batches(), max_epochs=1):
            log(state, loss=state.loss, n=torch.tensor([3]), note="warm", **{"val/x": 0.5})
    found = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["samples"] for row in found] == [5, 10, 15, 20, 25, 30, 35]
    assert [float(row["loss"]) for row in rows(tmp_path / "metrics.csv")] == [
        row["loss"] for row in found
    ]
    assert found[0] | {"n": 3, "note": "warm", "val/x": 0.5, "epoch": 0} == found[0]
    assert [dict(record.values) for record in seen] == [
        {key: row[key] for key in ("loss", "n", "note", "val/x")} for row in found
    ]


def test_without_values_it_logs_the_metrics_of_the_update(tmp_path):
    """`log(state)` is state.metrics: loss, lr, and what the step function returned."""
    state = make_state()
    lk.train_step(lambda s, b: {"loss": classifier(s, b), "width": torch.tensor(2.0)})(
        state, make_batches(1)[0]
    )
    with lk.Log(tmp_path) as log:
        log(state)
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert row["loss"] == float(state.loss)
    assert (row["width"], row["lr"]) == (2.0, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("every", "first", "steps"),
    [(3, False, [3, 6, 9]), (3, True, [1, 3, 6, 9]), ("epoch", False, [5, 10])],
)
def test_wrap_logs_every_so_often(tmp_path, every, first, steps):
    """`wrap` logs by updates or epochs, also the first, before the body, and passes states on."""
    state, passed = make_state(), []
    with lk.Log(tmp_path) as log:
        run = log.wrap(
            lk.run(classifier, state, make_batches(5), max_epochs=2),
            every=every, first=first, extras=[lk.learning_rates],
        )  # fmt: skip
        assert (run.total_steps, run.state) == (10, state)
        passed += [s.step for s in run]
    assert passed == [*range(1, 11)]
    found = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == steps
    assert all(row["lr/0"] == pytest.approx(0.01) for row in found)


def test_logging_changes_nothing_of_the_training(tmp_path):
    """Weights and random numbers are bit for bit those of a run that is not logged."""
    plain, logged = make_state("dropout"), make_state("dropout")
    torch.manual_seed(3)
    list(lk.run(classifier, plain, make_batches(), max_epochs=2))
    torch.manual_seed(3)
    run = lk.run(classifier, logged, make_batches(), max_epochs=2)
    with lk.Log(tmp_path, "jsonl", "csv") as log:
        list(lk.progress(log.wrap(run, every=1), file=io.StringIO()))
    assert all(map(torch.equal, plain.model.parameters(), logged.model.parameters()))


def test_numbers_that_are_not_finite_are_written_not_hidden(tmp_path):
    """NaN and infinities are valid JSON, and read back as themselves from both files."""
    with lk.Log(tmp_path, "jsonl", "csv") as log:
        log(at(1), a=float("nan"), b=torch.tensor(float("-inf")), c=float("inf"))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["a"], row["b"], row["c"]) == ("NaN", "-Infinity", "Infinity")
    assert [float(rows(tmp_path / "metrics.csv")[0][k]) for k in "bc"] == [-torch.inf, torch.inf]


def test_a_column_that_comes_later_is_added(tmp_path):
    """CSV stays one table: earlier rows are empty in the new column."""
    with lk.Log(tmp_path, "csv") as log:
        log(at(1), loss=1.0)
        log(at(2), loss=0.5, **{"val/loss": 0.7})
        log(at(3), loss=0.4)
    found = rows(tmp_path / "metrics.csv")
    assert [row["val/loss"] for row in found] == ["", "0.7", ""]
    assert [row["loss"] for row in found] == ["1.0", "0.5", "0.4"]


def test_names_of_the_clock_are_kept_apart(tmp_path):
    """A value named as a column of the clock does not overwrite it."""
    with lk.Log(tmp_path, "jsonl") as log:
        log(at(7), epoch=99, time=1.0)
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert (row["step"], row["epoch"], row["values/epoch"], row["values/time"]) == (7, 0, 99, 1.0)


def test_the_console_line_is_the_users_own(tmp_path):
    """Console lines go through loguru as the user's module, though loopkit is silent."""
    caught = []
    handler = logger.add(caught.append, format="{name}|{level}|{message}")
    try:
        with lk.Log(tmp_path, lk.Console(level="WARNING")) as log:
            log(at(3), loss=0.25, **{"val/acc": 0.5})
    finally:
        logger.remove(handler)
    assert caught == [f"{__name__}|WARNING|step 3  epoch 0  loss 0.25  val/acc 0.5\n"]


# Resuming


def logged_steps(path):
    return [row["step"] for row in lines(path)] if path.suffix == ".jsonl" else [
        int(row["step"]) for row in rows(path)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_a_resumed_run_drops_what_its_checkpoint_has_not_seen(tmp_path, name):
    """Killed after update 7, restored at 4: the curve is that of the run that went through."""
    folder, file = tmp_path / "run", tmp_path / "run" / f"metrics.{name}"

    def train(max_steps):
        state = make_state()
        with lk.Checkpointer(tmp_path / "saved", every=4) as checkpoints:
            checkpoints.restore(state)
            with lk.Log(folder, name) as log:
                run = lk.run(classifier, state, make_batches(), max_epochs=3)
                for state in log.wrap(checkpoints.wrap(run), every=1):
                    if state.step == max_steps:
                        break  # no save at the end, as when killed

    train(7)
    assert logged_steps(file) == [1, 2, 3, 4, 5, 6, 7]
    train(21)
    assert logged_steps(file) == [*range(1, 22)]
    first = {row["step"]: row["loss"] for row in (lines(file) if name == "jsonl" else rows(file))}
    through = make_state()
    losses = [float(s.loss) for s in lk.run(classifier, through, make_batches(), max_epochs=3)]
    assert [float(loss) for loss in first.values()] == losses


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_a_run_from_the_start_gives_earlier_records_another_name(tmp_path, name):
    """The same folder used again: nothing of the first run is lost, or mixed in."""
    for end in (3, 2, 1):
        with lk.Log(tmp_path, name) as log:
            list(log.wrap(lk.run(classifier, make_state(), make_batches(), max_steps=end), every=1))
    assert logged_steps(tmp_path / f"metrics.{name}") == [1]
    assert logged_steps(tmp_path / f"metrics.1.{name}") == [1, 2, 3]
    assert logged_steps(tmp_path / f"metrics.2.{name}") == [1, 2]


def test_a_log_in_a_loop_by_hand_goes_on_before_its_first_record(tmp_path):
    """Without run or Checkpointer, records from the first new one on are made again."""
    for steps in ([2, 4, 6, 8], [6, 8, 10]):
        with lk.Log(tmp_path) as log:
            for step in steps:
                log(at(step), loss=step / 10)
    assert logged_steps(tmp_path / "metrics.jsonl") == [2, 4, 6, 8, 10]


def test_lines_that_a_full_disk_cut_are_left_out(tmp_path):
    """Torn or foreign lines of either file are no records, and do not stop a resumed run."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    (tmp_path / "metrics.csv").write_text("step,epoch,samples,time,loss\n1,0,5,0,1.0\n2,0,1")
    with lk.Log(tmp_path, "jsonl", "csv") as log:
        log(at(3), loss=0.1)
    assert logged_steps(tmp_path / "metrics.jsonl") == [1, 3]
    assert logged_steps(tmp_path / "metrics.csv") == [1, 3]


def test_every_record_is_on_disk_when_the_process_is_killed(tmp_path):
    """SIGKILL right after a call: the records of all calls before it are whole."""
    script = textwrap.dedent(f"""
        import os, signal, torch, loopkit as lk
        state = lk.TrainState(torch.nn.Linear(1, 1))
        log = lk.Log({str(tmp_path)!r}, "jsonl", "csv")
        for state.step in range(1, 101):
            log(state, loss=1 / state.step)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert STARTER.run(script).returncode == -9
    assert logged_steps(tmp_path / "metrics.jsonl") == [*range(1, 101)]
    assert logged_steps(tmp_path / "metrics.csv") == [*range(1, 101)]


def test_a_log_that_nobody_closed_loses_nothing(tmp_path):
    """At the end of the process what was logged is written and closed, without a warning."""
    script = textwrap.dedent(f"""
        import torch, loopkit as lk
        seen = []
        class Late(lk.Sink):
            def write(self, record): seen.append(record.step)
            def close(self): print("closed after", seen)
        log = lk.Log({str(tmp_path)!r}, Late(), "jsonl")
        log(lk.TrainState(torch.nn.Linear(1, 1)), loss=1)
    """)
    done = STARTER.run(script)
    assert (done.stdout, done.stderr) == ("closed after [0]\n", "")


# Numbers on their way from a device


@attrs.define
class Gate:
    """An event of a device that is still busy."""

    open: bool = False
    waited: int = 0

    def query(self):
        return self.open

    def synchronize(self):
        self.waited += 1


def late(gate, value):
    return Fetched({"loss": 0.0}, [(["loss"], torch.tensor([value]), gate)])


def deliver(tmp_path):
    from loopkit.observe.delivery import Delivery, Guarded
    from loopkit.observe.sink import Function, Opening

    seen = []
    return Delivery([Guarded(Function(seen.append))], Opening(tmp_path, {}, -1)), seen


def test_records_wait_for_their_numbers_and_keep_their_order(tmp_path):
    """What has not arrived is not waited for, nor overtaken; it is written with a later call."""
    delivery, seen = deliver(tmp_path)
    gate = Gate()
    delivery.add(lk.Record(1, 0, 0, 0.0, {}), late(gate, 0.5))
    delivery.add(lk.Record(2, 0, 0, 0.0, {}), fetch("log", {"loss": 0.25}))
    assert (seen, gate.waited) == ([], 0)
    gate.open = True
    delivery.add(lk.Record(3, 0, 0, 0.0, {}), late(Gate(), 0.125))
    assert [(r.step, r.values["loss"]) for r in seen] == [(1, 0.5), (2, 0.25)]
    delivery.flush()
    assert [(r.step, r.values["loss"]) for r in seen][2:] == [(3, 0.125)]


def test_records_that_wait_are_bounded(tmp_path):
    """A device that lags far behind is waited for, rather than memory filled without end."""
    delivery, seen = deliver(tmp_path)
    gates = [Gate() for _ in range(MOST_WAITING + 3)]
    for step, gate in enumerate(gates):
        delivery.add(lk.Record(step, 0, 0, 0.0, {}), late(gate, 1.0))
    assert [record.step for record in seen] == [0, 1, 2]
    assert [gate.waited for gate in gates[:4]] == [1, 1, 1, 0]


def test_a_value_is_that_of_the_call(tmp_path):
    """A tensor that is changed in place after the call was logged as it was."""
    seen, state, value = [], make_state(), torch.tensor(1.0)
    with lk.Log(tmp_path, seen.append) as log:
        log(state, x=value)
        value.fill_(2.0)
    assert seen[0].values == {"x": 1.0}


# Sinks that fail


class Failing(lk.Sink):
    def __init__(self, error, *, at=("open", "write", "flush", "close")):
        self.error, self.at, self.calls = error, at, []

    def _do(self, name):
        self.calls.append(name)
        if name in self.at:
            raise self.error

    def open(self, run):
        self._do("open")

    def write(self, record):
        self._do("write")

    def flush(self):
        self._do("flush")

    def close(self):
        self._do("close")


@pytest.mark.parametrize("place", ["open", "write", "flush", "close"])
def test_a_sink_that_fails_is_told_once_and_the_run_goes_on(tmp_path, place):
    """Whatever a sink raises, wherever: one warning, the other sinks complete, the run too."""
    sink = Failing(OSError("disk full at https://me:hunter2@host"), at=(place,))
    run = lk.run(classifier, make_state(), make_batches(), max_epochs=1)
    with pytest.warns(lk.LogWarning) as warned, lk.Log(tmp_path, sink, "jsonl") as log:
        assert len([*log.wrap(run, every=1)]) == 7
    (warning,) = warned
    assert "Failing failed (OSError: disk full" in str(warning.message)
    assert "hunter2" not in str(warning.message)
    assert logged_steps(tmp_path / "metrics.jsonl") == [*range(1, 8)]


def test_a_failing_sink_is_asked_ever_less_often(tmp_path, monkeypatch):
    """A tracker that takes long to fail is left alone for a while, and taken up when it is back."""
    now = [0.0]
    monkeypatch.setattr("loopkit.observe.delivery.time.monotonic", lambda: now[0])
    sink = Failing(OSError("away"), at=("write",))
    state = make_state()
    with pytest.warns(lk.LogWarning) as warned, lk.Log(tmp_path, sink) as log:  # noqa: PT031
        for step in range(1, 101):
            now[0] = float(step)
            log(at(step, state), loss=1.0)
        assert sink.calls.count("write") == 6  # after 2, 4, 8, ... seconds
        assert log.lost == 100
        sink.at, now[0] = (), 500.0
        log(at(101, state), loss=1.0)
        assert log.lost == 100
    assert len(warned) == 1


def test_a_full_disk_costs_records_not_the_run(tmp_path):
    """/dev/full: each write fails as on a full disk; the run goes on, told once."""
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")

    class OnFullDisk(lk.JSONL):
        def open(self, run):
            self.path = full

    run = lk.run(classifier, make_state(), make_batches(), max_epochs=1)
    full_disk = pytest.warns(lk.LogWarning, match="No space left")
    with full_disk, lk.Log(tmp_path, OnFullDisk(), "csv") as log:
        list(log.wrap(run, every=1))
    assert logged_steps(tmp_path / "metrics.csv") == [*range(1, 8)]


# What may be written


HOSTILE = st.text(st.characters(codec=None), min_size=1, max_size=20)


@settings(max_examples=1000, deadline=None)
@example({"state": "a\nb", "self": "\u2028", "\r\n": "\x00", "\x85": float("nan")})
@given(st.dictionaries(HOSTILE, HOSTILE | st.floats(), max_size=4))
def test_each_record_stays_one_line_whatever_it_is_called(tmp_path_factory, values):
    """Newlines and escapes in names, text and settings: one line of JSON, one row, one shown."""
    folder = tmp_path_factory.mktemp("log")
    shown, console = [], lk.Console()
    show = lambda record: shown.append(console.line(record))  # noqa: E731
    with lk.Log(folder, "jsonl", "csv", show, config=values) as log:
        log(make_state(), **{"loss": 1.0, **values})
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["step"] == 0
    text = (folder / "metrics.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    assert shown[0].isprintable()
    if values:
        (settings,) = (folder / "config.json").read_text().splitlines()
        assert isinstance(json.loads(settings, parse_constant=pytest.fail), dict)


def test_secrets_and_environments_are_nowhere_in_the_folder(tmp_path, monkeypatch):
    """Seeded secrets in settings, values, names, errors and the environment: no file has one."""
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-env")

    @dataclasses.dataclass
    class Hub:
        hub_token: str = "s3cr3t-hub"  # noqa: S105 - seeded
        url: str = "https://me:s3cr3t-url@host/x"

    config = {
        "lr": 0.1, "max_tokens": 512, "tokenizer": "bpe", "environment": os.environ,
        "env": os.environ, "hub": Hub(), "argv": ["--api-key=s3cr3t-argv"],
        "db": {"password": 7777},
        "options": Namespace(secret_key="s3cr3t-space"),  # noqa: S106 - seeded
        "credentials": {"any": "s3cr3t-inner"},
    }  # fmt: skip
    log = lk.Log(tmp_path, "jsonl", "csv", Failing(ValueError("token=s3cr3t-error")), config=config)
    with pytest.warns(lk.LogWarning), log:
        log(at(1), api_key="s3cr3t-value", note="Bearer s3cr3t-bearer", n_tokens=3)
    for path in tmp_path.rglob("*"):
        assert "s3cr3t" not in path.read_text(), path
    kept = json.loads((tmp_path / "config.json").read_text())
    assert (kept["lr"], kept["max_tokens"], kept["tokenizer"]) == (0.1, 512, "bpe")
    assert (kept["db/password"], kept["env"]) == ("[redacted]", "[redacted]")
    assert lines(tmp_path / "metrics.jsonl")[0]["n_tokens"] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("api_key", "x"), ("apiKey", "x"), ("HF_TOKEN", "x"), ("awsSecretAccessKey", "x"),
     ("db_password", 1234), ("AUTH", "x"), ("client-secret", "x"), ("credentials", "x")],
)  # fmt: skip
def test_names_that_say_so_are_redacted(name, value):
    """However they are written."""
    assert redacted(name, value) == "[redacted]"


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 512), ("tokens_per_s", 1e5), ("tokenizer", "bpe"), ("monkey", "x"), ("key_dim", 64),
     ("keyboard", "x"), ("author", "Ada"), ("loss", 0.5)],
)  # fmt: skip
def test_names_that_do_not_are_kept(name, value):
    """Counts of tokens, tokenizers and the like are no secrets."""
    assert redacted(name, value) == value


@pytest.mark.parametrize(
    "text", ["hf_" + "a1B2" * 6, "sk-" + "a1B2" * 6, "ghp_" + "a1B2" * 6, "AKIA" + "ABCD" * 4,
             "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl"],
)  # fmt: skip
def test_tokens_are_redacted_wherever_they_stand(text):
    """The forms of widely used tokens, in the middle of a text."""
    assert text not in redacted_text(f"could not log in with {text}, sorry")


# Ranks


def test_one_rank_writes(tmp_path):
    """Of two processes that train together, the first alone makes files, and neither fails."""
    script = textwrap.dedent(f"""
        import torch, loopkit as lk
        torch.distributed.init_process_group("gloo")
        state = lk.TrainState(torch.nn.Linear(1, 1))
        opened = []
        folder = {str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}"
        with lk.Log(folder, lk.CSV(), opened.append) as log:
            for state in lk.progress(log.wrap([state], every=1)):
                log(state, loss=1.0)
        print(torch.distributed.get_rank(), len(opened), flush=True)
        torch.distributed.destroy_process_group()
    """)
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(path)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == [
        "",
        "0 1",
        "1 0",
    ]  # no update was made: wrap logs none
    assert (tmp_path / "0" / "metrics.csv").exists()
    assert not (tmp_path / "1").exists()


# Wrong uses


def closed(tmp_path):
    log = lk.Log(tmp_path)
    log.close()
    log.close()  # again is no error
    return log


WRONG = {
    "an unknown sink": (lambda d: lk.Log(d, "tensorbord"), "'tensorbord'", "'tensorboard'"),
    "a class as a sink": (lambda d: lk.Log(d, lk.CSV), "a class", "CSV()"),
    "a number as a sink": (lambda d: lk.Log(d, 3), "int", "lk.CSV()"),
    "a step as the state": (lambda d: lk.Log(d)(7, loss=1), "int as the state", "log(state"),
    "a matrix": (lambda d: lk.Log(d)(at(1), x=torch.ones(2, 2)), "(2, 2)", "x.mean()"),
    "a list": (lambda d: lk.Log(d)(at(1), x=[1]), "a list", "a number"),
    "a closed log": (lambda d: closed(d)(at(1), x=1), "closed", "a new lk.Log"),
    "no interval": (lambda d: lk.Log(d).wrap([], every="often"), "the unit 'often'", "500"),
    "an interval of zero": (lambda d: lk.Log(d).wrap([], every=0), "interval = 0", "1 or more"),
    "a step to wrap": (lambda d: lk.Log(d).wrap(3), "int", "lk.run("),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(tmp_path, case):
    """It names what was found, and what to write instead."""
    wrong, found, instead = WRONG[case]
    with pytest.raises(lk.UsageError) as caught:
        wrong(tmp_path)
    assert found in caught.value.found + caught.value.wrote
    assert instead in caught.value.instead


def test_a_missing_package_is_said_when_the_sink_is_written(monkeypatch):
    """Not at the first record, hours later."""
    monkeypatch.setattr("loopkit.observe.trackers.find_spec", lambda name: None)
    for sink in (lk.TensorBoard, lk.WandB, lk.MLflow):
        with pytest.raises(lk.MissingExtraError, match="pip install"):
            sink()


def test_making_a_log_costs_nothing(tmp_path):
    """Neither a folder, nor a package, nor a thread, before the first record."""
    script = textwrap.dedent(f"""
        import sys, threading, loopkit as lk
        log = lk.Log({str(tmp_path / "run")!r}, "tensorboard", "wandb", "mlflow", "csv")
        print([n for n in ("tensorboard", "wandb", "mlflow") if n in sys.modules],
              threading.active_count())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[] 1\n"
    assert not (tmp_path / "run").exists()


def test_without_a_network_everything_local_works(tmp_path):
    """Files, TensorBoard and the console need no socket: one that is opened would raise."""
    script = textwrap.dedent(f"""
        import socket, torch
        def refused(*args, **settings):
            raise AssertionError("a socket was opened")
        socket.socket = socket.create_connection = refused
        import loopkit as lk
        state = lk.TrainState(torch.nn.Linear(1, 1))
        with lk.Log({str(tmp_path)!r}, "jsonl", "csv", "tensorboard", "console") as log:
            log(state, loss=1.0)
        print(log.lost)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "0\n"
    assert logged_steps(tmp_path / "metrics.jsonl") == [0]
