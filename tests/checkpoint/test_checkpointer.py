"""What users call, and what they are told."""

import math
import re

import loopkit as lk
import pytest
import torch
from torch import nn

from trainings import STEPS, digest, digest_of, make_batches, make_state, restored, train


def test_list_shows_steps_and_scores(tmp_path):
    """A checkpoint prints its step and its scores; the folder has the name of its step."""
    state = make_state()
    with lk.Checkpointer(tmp_path, monitor="accuracy", mode="max") as checkpoints:
        state.step, state.samples = 1200, 38400
        checkpoints.save(state, {"accuracy": 0.93412345, "loss": torch.tensor(0.5)})
        (checkpoint,) = checkpoints.list()
    assert repr(checkpoint) == "Checkpoint(step=1200, accuracy=0.934123, loss=0.5)"
    assert checkpoint.path == tmp_path / "step-000000001200"
    assert checkpoint.manifest.samples == 38400
    assert checkpoint.size == sum(
        path.stat().st_size for path in checkpoint.path.iterdir() if path.name != "manifest.json"
    )
    assert checkpoints.best.path == checkpoints.latest.path == checkpoint.path


def test_an_empty_folder_has_neither_best_nor_latest(tmp_path):
    """None, an empty list, and restore says False; nothing is made by asking."""
    checkpoints = lk.Checkpointer(tmp_path / "run", monitor="loss")
    assert checkpoints.best is checkpoints.latest is None
    assert checkpoints.list() == []
    assert checkpoints.restore(make_state()) is False
    assert checkpoints.restore(make_state(), "best") is False
    assert not (tmp_path / "run").exists()


U = lk.UsageError
WRONG = {
    "one to keep": (lambda t: lk.Checkpointer(t, keep_last=1), U, "nothing is left to go on from"),
    "none to keep": (lambda t: lk.Checkpointer(t, keep_last=0), U, "1 or more"),
    "no best to keep": (lambda t: lk.Checkpointer(t, keep_best=0), U, "1 or more"),
    "another mode": (lambda t: lk.Checkpointer(t, mode="higher"), U, "'min' or 'max'"),
    "no interval": (lambda t: lk.Checkpointer(t, every="often"), U, '"10min"'),
    "half an update": (lambda t: lk.Checkpointer(t, every=0.5), U, '"0.5ep"'),
    "never": (lambda t: lk.Checkpointer(t, every=0), U, "1 or more"),
    "no policy": (lambda t: lk.CheckpointOptions(on_error="ignore"), U, "'raise' or 'warn'"),
    "no other policy": (lambda t: lk.CheckpointOptions(when_busy="skip"), U, "'wait' or 'drop'"),
    "wrap without every": (lambda t: lk.Checkpointer(t).wrap([]), U, "every=500"),
    "the monitored score missing": (
        lambda t: lk.Checkpointer(t, monitor="acc").save(make_state(), {"accuracy": 1, "loss": 2}),
        U, "['accuracy', 'loss']",
    ),
    "a bare score": (
        lambda t: lk.Checkpointer(t, monitor="acc").save(make_state(), 0.5), U, '{"acc": score}',
    ),
    "a score that is no number": (
        lambda t: lk.Checkpointer(t).save(make_state(), {"confusion": torch.ones(2, 2)}),
        U, "confusion",
    ),
    "an extra that is no data": (
        lambda t: lk.Checkpointer(t).save(make_state(more=[torch.eye(2).to_sparse()])),
        U, "extras.more.0",
    ),
    "weights that are not finite": (
        lambda t: lk.Checkpointer(t, async_save=False).save(broken()), lk.NonFiniteError, "0.bias",
    ),
}  # fmt: skip


def broken(value=math.nan):
    state = make_state()
    with torch.no_grad():
        state.model[0].bias[3] = value
    return state


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(tmp_path, case):
    """What is wrong is said where it is written, with what to write instead."""
    wrong, kind, text = WRONG[case]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        wrong(tmp_path)
    assert caught.value.instead
    assert [*tmp_path.glob("step-*")] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved_unless_asked_for(tmp_path, value):
    """The last good checkpoint stays the newest; an option saves them all the same."""
    with lk.Checkpointer(tmp_path, async_save=False) as checkpoints:
        checkpoints.save(make_state())
        with pytest.raises(lk.NonFiniteError, match=r"step 0: 0\.bias"):
            checkpoints.save(broken(value))
        assert len(checkpoints.list()) == 1
    options = lk.CheckpointOptions(allow_nonfinite=True)
    with lk.Checkpointer(tmp_path, options=options) as checkpoints:
        checkpoints.save(broken(value))
    assert restored(tmp_path) == digest_of(broken(value))


@pytest.mark.parametrize("ask", [
    lambda checkpoints: checkpoints.save(make_state()),
    lk.Checkpointer.wait,
    lk.Checkpointer.close,
    lambda checkpoints: checkpoints.ensure(make_state()),
])  # fmt: skip
@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_of_a_save_in_the_background_whatever_asks_next_says_that_it_is_not_finite(
    tmp_path, ask, policy
):
    """No policy lets it pass: weights do not become finite again; and nothing of it is left."""
    options = lk.CheckpointOptions(on_error=policy)
    checkpoints = lk.Checkpointer(tmp_path, options=options)
    checkpoints.save(broken())
    with pytest.raises(lk.NonFiniteError, match=r"step 0: 0\.bias"):
        ask(checkpoints)
    checkpoints.close()
    assert checkpoints.list() == []
    assert [*tmp_path.glob(".tmp*")] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_weights_are_finite(tmp_path, dtype):
    """A sum that overflows is no weight that did; buffers may hold infinities (masks do)."""
    model = nn.Linear(64, 64).to(dtype)
    nn.init.constant_(model.weight, torch.finfo(dtype).max)
    model.register_buffer("mask", torch.full((3,), -math.inf))
    with lk.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.save(lk.TrainState(model))


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (3, [3, 6, 9, 12, 14]),
        ("epoch", [7, 14]),
        (100, [14]),
        ("1h", [14]),
        (1, [*range(1, 15)]),
        ("0.25ep", [2, 4, 6, 7, 9, 11, 13, 14]),
    ],
)
def test_wrap_saves_every_so_often_and_at_the_end(tmp_path, every, steps):
    """Every n updates, at epochs' ends, after a time; and at the end of the run."""
    checkpoints = lk.Checkpointer(tmp_path, every=every, keep_last=None)
    run = checkpoints.wrap(lk.run(STEPS["plain"], make_state(), make_batches(), max_epochs=2))
    assert run.total_steps == 14
    seen = [state.step for state in run]
    assert seen == [*range(1, 15)]
    assert [checkpoint.step for checkpoint in checkpoints.list()] == steps
    checkpoints.close()


def test_wrap_saves_after_the_body_of_the_loop(tmp_path):
    """What the body keeps is saved with its update; what it saved is not saved again."""
    checkpoints = lk.Checkpointer(tmp_path, every=2, keep_last=None)
    state = make_state(best=0)
    with checkpoints.wrap(lk.run(STEPS["plain"], state, make_batches(), max_steps=6)) as run:
        for state in run:
            state.extras["best"] = state.step
            if state.step == 4:
                checkpoints.save(state, {"loss": 0.5})
    assert [(c.step, dict(c.scores)) for c in checkpoints.list()] == [
        (2, {}),
        (4, {"loss": 0.5}),
        (6, {}),
    ]
    back = make_state()
    checkpoints.restore(back, "step-000000000002")
    assert back.extras["best"] == 2
    checkpoints.close()


def test_a_break_ends_the_wrapped_run(tmp_path):
    """Leaving the loop leaves a state that can be saved, and a run that can be resumed."""
    checkpoints = lk.Checkpointer(tmp_path, every=2)
    state = make_state()
    for state in checkpoints.wrap(lk.run(STEPS["plain"], state, make_batches())):
        if state.step == 5:
            break
    checkpoints.close()
    assert checkpoints.latest.step == 4
    assert lk.Checkpointer(tmp_path).restore(state)
    assert state.step == 4


def test_sha256_is_written_and_checked(tmp_path):
    """By option: it is in the manifest, and a change that fools crc32 is found."""
    with lk.Checkpointer(tmp_path, options=lk.CheckpointOptions(sha256=True)) as checkpoints:
        checkpoints.save(make_state())
    files = checkpoints.latest.manifest.files
    assert all(len(file.sha256) == 64 for file in files.values())
    assert restored(tmp_path) == digest_of(make_state())


def test_the_model_of_a_checkpoint_is_a_plain_safetensors_file(tmp_path):
    """Other programs read it by the model's own keys."""
    from safetensors.torch import load_file

    state = train(make_state(), 1)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    tensors = load_file(checkpoints.latest.path / "model.safetensors")
    assert digest({k: tensors[k] for k in state.model.state_dict()}) == digest(
        dict(state.model.state_dict())
    )


def test_a_log_line_for_each_save(tmp_path):
    """Those who enable the library's log see what was saved."""
    from loguru import logger

    lines = []
    handler = logger.add(lines.append, format="{message}")
    logger.enable("loopkit")
    try:
        with lk.Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(make_state(), {"a\nb": 1})
    finally:
        logger.disable("loopkit")
        logger.remove(handler)
    assert len(lines) == 1
    assert str(lines[0]).count("\n") == 1
