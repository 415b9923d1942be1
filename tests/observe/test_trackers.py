"""TensorBoard, W&B and MLflow, read back with their own readers."""

import json
import math
import re
import struct
import subprocess
import sys
import time
import warnings

import loopkit as lk
import pytest
import torch
from loopkit.observe.record import spelled
from synced import tracker

from problems import classifier, make_batches, make_state


def train_and_log(log, *, updates=6, state=None):
    state = state or make_state()
    for state in log.wrap(lk.run(classifier, state, make_batches(), max_steps=updates), every=2):
        if state.step == updates:
            log(state, **{"val/accuracy": 0.75, "note": "first\nsecond"})
    return state


def at_step(step):
    state = make_state()
    state.step = step
    return state


def quiet(test):
    """Warnings of the trackers' own packages are not ours."""
    return pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")(test)


# TensorBoard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@quiet
def test_tensorboard_files_hold_what_was_logged(tmp_path):
    """TensorBoard's own reader gives the numbers at their updates, the text and the settings."""
    with lk.Log(tmp_path, lk.TensorBoard(), config={"lr": 0.1, "hub_token": "s3cr3t"}) as log:
        train_and_log(log)
    found = events(tmp_path)
    assert [e.step for e in found.Scalars("loss")] == [2, 4, 6]
    assert [e.step for e in found.Scalars("lr")] == [2, 4, 6]
    assert [(e.step, e.value) for e in found.Scalars("val/accuracy")] == [(6, 0.75)]
    text = found.Tensors("note/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == r"first\nsecond"
    config = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.1 |" in config
    assert "s3cr3t" not in config


@quiet
def test_tensorboard_curves_do_not_double_on_resume(tmp_path):
    """What a resumed run makes again replaces what was logged after its checkpoint."""
    with lk.Log(tmp_path, lk.TensorBoard()) as log:
        train_and_log(log, updates=6)
    state = make_state()
    list(lk.run(classifier, state, make_batches(), max_steps=4))  # as restored
    with lk.Log(tmp_path, lk.TensorBoard()) as log:
        train_and_log(log, updates=8, state=state)
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [2, 4, 6, 8]


@quiet
def test_tensorboards_writer_is_there_for_more(tmp_path):
    """An image or a histogram goes through torch's own writer."""
    board = lk.TensorBoard("board")
    with lk.Log(tmp_path, board) as log:
        log(make_state(), loss=1.0)
        board.writer.add_histogram("weights", torch.arange(10.0), 0)
    assert events(tmp_path / "board").Tags()["histograms"] == ["weights"]


# Weights & Biases


def wandb_records(file):
    """The records of an offline run: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def complete(file):
    """Its records, once the client's own process has written the last, soon after `finish`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = [*wandb_records(file)]
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("SECRET_OF_THE_SHELL", "env-s3cr3t")
    pytest.importorskip("wandb")
    return tmp_path / "run"


@quiet
def test_an_offline_run_of_wandb_holds_what_was_logged(wandb_offline):
    """The offline run, parsed, has each number at its update, and no secret or environment."""
    sink = lk.WandB("digits", mode="offline")
    with lk.Log(wandb_offline, sink, config={"lr": 0.1, "api_key": "s3cr3t"}) as log:
        train_and_log(log)
    (file,) = wandb_offline.glob("wandb/offline-run-*/run-*.wandb")
    records = complete(file)
    rows = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == [2, 4, 6]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["val/accuracy"] == 0.75
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert run.project == "digits"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lr"] == 0.1
    assert config["api_key"] == "[redacted]"
    for path in wandb_offline.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


@quiet
def test_wandbs_own_reader_reads_the_offline_run(wandb_offline, monkeypatch):
    """What `wandb sync` reads out of it and sends to a server is what was logged, bit for bit."""
    with lk.Log(
        wandb_offline, lk.WandB("digits", mode="offline"), "jsonl", config={"lr": 0.1}
    ) as log:
        train_and_log(log)
        log(at_step(7), bad=float("nan"), large=float("inf"))
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5" * 4)
    (folder,) = wandb_offline.glob("wandb/offline-run-*")
    complete(*folder.glob("run-*.wandb"))
    with tracker() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        done = subprocess.run(  # it leaves a log where it runs
            command, capture_output=True, text=True, timeout=120, check=False, cwd=wandb_offline
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (wandb_offline / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    sent = {row["_step"]: row for row in server.rows}
    assert [*sent] == [2, 4, 6, 7]
    for row in logged:
        names = row.keys() - {"step", "time"}
        assert {n: spelled(sent[row["step"]][n]) for n in names} == {n: row[n] for n in names}
    assert server.config["lr"] == 0.1
    assert b"env-s3cr3t" not in server.sent


@quiet
def test_a_resumed_run_of_wandb_keeps_its_id(wandb_offline):
    """The second process goes on with the first one's run; a run from the start has a new one."""
    ids = []
    for begun in (0, 4, 0):
        state = make_state()
        if begun:
            list(lk.run(classifier, state, make_batches(), max_steps=begun))
        with lk.Log(wandb_offline, lk.WandB("digits", mode="offline")) as log:
            train_and_log(log, updates=begun + 2, state=state)
        ids.append((wandb_offline / "wandb-run-id").read_text())
    assert ids[0] == ids[1]
    assert ids[2] != ids[1]


# MLflow


@pytest.fixture
def store(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at its import
        pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path}/mlflow.db"


def mlflow_run(store, folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    return client, client.get_run((folder / "mlflow-run-id").read_text())


def steps(client, run, name):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.filterwarnings("ignore")
def test_mlflows_store_holds_what_was_logged(tmp_path, store):
    """The store, queried, has experiment, name, numbers, settings, an end; no user or script."""
    folder = tmp_path / "first"
    sink = lk.MLflow("digits", uri=store)
    with lk.Log(folder, sink, config={"lr": 0.1, "password": "s3cr3t"}) as log:
        train_and_log(log)
    client, run = mlflow_run(store, folder)
    assert client.get_experiment(run.info.experiment_id).name == "digits"
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert steps(client, run, "loss") == [2, 4, 6]
    assert run.data.metrics["val/accuracy"] == 0.75
    assert run.data.params == {"lr": "0.1", "password": "[redacted]"}
    assert run.data.tags["note"] == r"first\nsecond"
    assert not [tag for tag in run.data.tags if re.search("user|source|git", tag)]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_of_mlflow_sends_nothing_twice(tmp_path, store):
    """The second process goes on in the same run with what the store does not have yet."""
    with lk.Log(tmp_path, lk.MLflow("digits", uri=store)) as log:
        train_and_log(log, updates=6)
    state = make_state()
    list(lk.run(classifier, state, make_batches(), max_steps=4))
    with lk.Log(tmp_path, lk.MLflow("digits", uri=store)) as log:
        train_and_log(log, updates=8, state=state)
    client, run = mlflow_run(store, tmp_path)
    assert steps(client, run, "loss") == [2, 4, 6, 8]
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_is_not_there_costs_a_warning(tmp_path):
    """A store that cannot be opened: the run goes on, and one warning says so."""
    sink = lk.MLflow("digits", uri="nosuch://store")
    warns = pytest.warns(lk.LogWarning, match="MLflow failed")
    with warns as warned, lk.Log(tmp_path, sink, "jsonl") as log:
        state = train_and_log(log)
    assert state.step == 6
    assert len([w for w in warned if w.category is lk.LogWarning]) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
