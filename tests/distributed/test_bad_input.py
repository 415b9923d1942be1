"""What cannot be on several ranks is an error on all of them, which says what to write."""

import functools
import os
import time
from pathlib import Path

import loopkit as lk
import pytest
import torch
import torch.distributed as dist
from test_parity import PLAN, Blocks, classifier, fresh

from pool import POOL
from problems import make_batches


def set_up(strategy):
    with pytest.raises(lk.UsageError) as caught:
        lk.distributed(strategy)(classifier).set_up(fresh())
    return str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "world", "words"),
    [
        (lk.FSDP(replicas=3), 4, ("FSDP(replicas=3)", "4 processes", "that divide")),
        (lk.FSDP(replicas=4), 2, ("FSDP(replicas=4)", "2 processes", "that divide")),
        (lk.TensorParallel(PLAN, size=3), 4, ("size=3", "4 processes", "a size that divides")),
        (lk.FSDP(blocks=("layer.0",)), 2, ("'layer.0'", "no module", "'layers.0'")),
        (lk.FSDP(precision="int8"), 2, ("precision='int8'", '"bf16"')),
        (lk.FSDP(methods=("answer",)), 2, ("'answer'", "no such method of Blocks")),
    ],
)
def test_settings_that_do_not_fit_the_ranks(strategy, world, words):
    """Known only once the ranks are there, and said at set-up, on each of them."""
    for message in POOL.run(world, set_up, strategy):
        assert all(word in message for word in words), message


def set_up_line_search():
    state = fresh(torch.optim.LBFGS)
    with pytest.raises(lk.CompositionError) as caught:
        lk.compose(lk.with_closure(), lk.distributed("zero1"))(classifier).set_up(state)
    return str(caught.value)


def test_an_optimizer_that_evaluates_the_loss_updates_no_part_by_itself():
    """Zero1 with LBFGS is refused at set-up, on each rank."""
    for message in POOL.run(2, set_up_line_search):
        assert "LBFGS, which evaluates the loss for all parameters" in message
        assert 'distributed("ddp")' in message


@pytest.mark.parametrize("strategy", ["dpp", "deepspeed", "", 3, None, lk.FSDP, torch.nn.Linear])
def test_a_strategy_that_there_is_not(strategy):
    """An error when it is written, on one process as well, that lists those that there are."""
    with pytest.raises(lk.UsageError) as caught:
        lk.distributed(strategy)
    assert "ddp" in str(caught.value)
    assert "zero1" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lk.distributed(uneven="join"),
        lambda: lk.distributed(stream="shard"),
        lambda: lk.distributed(timeout_s=0),
        lambda: lk.FSDP(replicas=0),
        lambda: lk.FSDP(replicas="racks"),
        lambda: lk.DDP(comm_hook="int8"),
        lambda: lk.TensorParallel(PLAN, size=0),
    ],
)
def test_settings_that_cannot_be(make):
    """The settings of a strategy are checked when they are written."""
    with pytest.raises(lk.UsageError, match="write instead"):
        make()


def outside(strategy):
    model, other = Blocks(), torch.nn.Linear(2, 2)
    parameters = [*model.parameters(), *other.parameters()]
    state = lk.TrainState(model, torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(lk.UsageError) as caught:
        lk.distributed(strategy)(classifier).set_up(state)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", lk.TensorParallel({})])
def test_an_optimizer_with_parameters_of_others(strategy):
    """Their gradients would differ on each rank, unseen."""
    for message in POOL.run(2, outside, strategy):
        assert "2 parameters in the optimizer that are not the model's" in message
        assert "ModuleDict" in message


def apart():
    state = fresh()
    state.step = 3 * int(os.environ["RANK"])
    with pytest.raises(lk.UsageError) as caught:
        lk.distributed()(classifier).set_up(state)
    return str(caught.value)


def test_ranks_that_begin_at_different_updates():
    """One restored and the other did not: both are told of both."""
    for message in POOL.run(2, apart):
        assert "[0, 3]" in message
        assert "a folder that all hosts share" in message


def generated(stream):
    data = make_batches(8, dtype=torch.float64)
    state = fresh()
    own = (
        data[dist.get_rank() :: 2] if dist.is_initialized() else data[int(os.environ["RANK"]) :: 2]
    )
    batches = iter(own if stream == "sharded" else data)
    try:
        run = lk.run(lk.distributed(stream=stream)(classifier), state, batches, max_epochs=1)
        return [s.step for s in run], sum(p.sum().item() for p in state.model.parameters())
    except lk.DataError as error:
        return str(error)


def test_a_generator_without_a_policy():
    """It may give the same samples on all ranks: the error names both policies, and both train."""
    for message in POOL.run(2, generated, None):
        assert "on 2 ranks" in message
        assert 'stream="split"' in message
        assert 'stream="sharded"' in message
    split = POOL.run(2, generated, "split")
    assert split == POOL.run(2, generated, "sharded")
    assert split[0][0] == [1, 2, 3, 4]


def too_early():
    state, data = fresh(), make_batches(4, dtype=torch.float64)
    trained = [s.step for s in lk.run(classifier, state, data, max_epochs=1)]  # each by itself
    with pytest.raises(lk.UsageError) as before:
        state.ranks.share(data)
    state = lk.distributed()(classifier).set_up(fresh())
    with pytest.raises(lk.UsageError) as of_another:
        fresh().ranks.share(data)
    return trained, str(before.value), str(of_another.value), len([*state.ranks.share(data)])


def test_sharing_before_the_set_up():
    """Each process would train on all of the data: the error says what comes before."""
    for trained, *messages, shared in POOL.run(2, too_early):
        assert (trained, shared) == ([1, 2, 3, 4], 2)
        for message in messages:
            assert "2 processes, and a state that is not set up for them" in message
            assert "state = step.set_up(state)" in message


def test_sharing_on_one_process(monkeypatch):
    """One process has all of the data, whoever started it; of many started by srun none has."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    data, state = make_batches(4), fresh()
    assert state.ranks.share(data) is data
    launched = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "a1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(lk.UsageError, match="8 processes"):
        state.ranks.share(data)


def joined():
    lk.distributed()(classifier).set_up(fresh())


def one_raises():
    joined()
    if os.environ["RANK"] == "1":
        raise KeyError("the label that was not there")
    lk.agree(True)
    return "never"


def one_exits():
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(60)


def one_hangs():
    if os.environ["RANK"] == "1":
        time.sleep(60)


def unpicklable():
    return lambda: None


@pytest.mark.parametrize(
    ("main", "words", "timeout_s"),
    [
        (
            one_raises,
            ("rank 1 failed", "KeyError: 'the label that was not there'", "one_raises"),
            100,
        ),
        (one_exits, ("rank 1 failed", "exit code 7"), 100),
        (one_hangs, ("1 still running at the time limit",), 6),
        (unpicklable, ("failed", "pickle"), 100),
    ],
)
def test_what_fails_under_launch_is_told(main, words, timeout_s, monkeypatch, record_property):
    """The first cause, with its traceback, or who is late; and no process stays behind."""
    monkeypatch.setattr("loopkit.parallel.launch.GRACE_S", 3.0)
    began, before = time.monotonic(), {*torch.multiprocessing.active_children()}
    with pytest.raises(lk.RankError) as caught:
        lk.launch(main, 2, timeout_s=timeout_s)
    seconds = time.monotonic() - began
    assert all(word in str(caught.value) for word in words), caught.value
    assert {*torch.multiprocessing.active_children()} <= before
    record_property("seconds", f"{seconds:.1f}")
    record_property("outcome", caught.value.found.splitlines()[0])


@pytest.mark.parametrize("given", [{"num_processes": 0}, {"num_processes": 2, "start_method": "x"}])
def test_settings_of_launch(given):
    """Checked before a process is started."""
    with pytest.raises(lk.UsageError, match=r"lk\.launch"):
        lk.launch(one_hangs, **given)


def wrapped():
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo")
    plain, messages = Blocks(), []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    sharded = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    for wrapper in (torch.nn.parallel.DistributedDataParallel, sharded):
        inner = wrapper(torch.nn.Linear(2, 2))
        for model in (inner, torch.nn.ModuleDict({"plain": plain, "inner": inner})):
            with pytest.raises(lk.UsageError) as caught:
                lk.TrainState(model, optimizer)
            messages.append(str(caught.value))
    return messages


def test_a_model_that_is_wrapped_already():
    """DDP's and FSDP's wrappers, whole or within: the error names it, and what takes its place."""
    (ddp, within, fsdp, also), _ = POOL.run(2, wrapped)
    assert "with a DistributedDataParallel as model: found" in ddp
    assert "model.inner.module" in within
    assert "@lk.distributed() on the step" in ddp
    assert "a FullyShardedDataParallel" in fsdp
    assert '@lk.distributed("fsdp")' in also


def trained_apart(folder, own):
    """What a script does that a launcher has started, and whose step has no `distributed`."""
    state, refused = fresh(), Path(folder + "-refused")
    checkpoints = lk.Checkpointer(f"{folder}/{os.environ['RANK']}" if own else folder)
    lk.run(classifier, state, make_batches(2, dtype=torch.float64), max_epochs=1).finish()
    try:
        checkpoints.save(state)
        while not own and not refused.exists():  # the other one finds the folder in use
            time.sleep(0.05)
    except lk.CheckpointError as error:
        refused.touch()
        return str(error)
    finally:
        checkpoints.close()


def test_processes_that_train_apart_are_told_of_distributed(tmp_path):
    """Saving into one folder is the error that says so; with a folder each they may."""
    assert POOL.run(2, trained_apart, str(tmp_path / "own"), True) == [None, None]
    (message,) = filter(None, POOL.run(2, trained_apart, str(tmp_path / "one"), False))
    assert "that a launcher has started, which trains by itself" in message
    assert "@lk.distributed() on the step" in message
    assert "a folder for each" in message
