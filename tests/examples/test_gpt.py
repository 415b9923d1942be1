"""The GPT learns, and goes on where it was stopped."""

import shutil

import loopkit as lk
import pytest
import torch

import gpt


@pytest.fixture
def small(monkeypatch):
    """A tiny model on 400 functions."""
    texts = gpt.functions()[:400]
    monkeypatch.setattr(gpt, "functions", lambda: texts)
    for name, value in {"WIDTH": 32, "LAYERS": 1, "SAVE_EVERY": 20, "WRITTEN": 2}.items():
        monkeypatch.setattr(gpt, name, value)


def test_it_learns_and_goes_on_bit_for_bit(small, tmp_path, capsys):
    """The loss falls from log(128) = 4.85; a run stopped at update 40 ends at the very same."""
    run = ["--updates", "60", "--folder", str(tmp_path)]
    loss = gpt.main(run)
    assert loss < 4.2
    assert "going on" not in capsys.readouterr().out
    last = lk.Checkpointer(tmp_path).latest
    assert last.step == 60
    shutil.rmtree(last.path)
    assert gpt.main(run) == loss
    assert "going on from update 40" in capsys.readouterr().out


def test_padding_counts_for_nothing():
    """The loss and weight of functions of unlike lengths are those of their characters alone."""
    a, b = torch.tensor([0, 65, 66, 67, 0]), torch.tensor([0, 68, 0])
    state = lk.TrainState(gpt.GPT())
    parts = [gpt.train_step.function(state, gpt.collate([f])) for f in (a, b)]
    whole = gpt.train_step.function(state, gpt.collate([a, b]))
    assert [p["weight"].item() for p in (*parts, whole)] == [4, 2, 6]
    mean = sum(p["loss"] * p["weight"] for p in parts) / 6
    torch.testing.assert_close(whole["loss"], mean)


def test_only_grammatical_functions_count():
    """What cannot be parsed, or is nothing, is no Python."""
    assert gpt.is_python("def f(x):\n    return x")
    assert not gpt.is_python("def f(x:\n    return x")
    assert not gpt.is_python("")


def on_ranks(strategy, folder, updates):
    """The example on one of several ranks."""
    import gpt as example

    texts = example.functions()[:400]
    example.functions = lambda: texts
    example.WIDTH, example.LAYERS, example.SAVE_EVERY, example.WRITTEN = 32, 1, 20, 2
    return example.main(["--updates", str(updates), "--folder", folder, "--strategy", strategy])


@pytest.mark.timeout(280)
def test_it_learns_on_two_ranks_and_goes_on_sharded(tmp_path):
    """Begun with DDP and gone on with FSDP2: the loss is that of both ranks, and has fallen."""
    first, second = lk.launch(on_ranks, 2, "ddp", str(tmp_path), 30, timeout_s=250)
    assert first == second
    sharded, other = lk.launch(on_ranks, 2, "fsdp", str(tmp_path), 40, timeout_s=250)
    assert sharded == other
    assert sharded < first < 4.4
