"""The GPT learns, and goes on where it was stopped."""

import ast
import shutil

import loopkit as lk
import pytest
import torch

import gpt
from pool import POOL

SMALL = {"WIDTH": 32, "LAYERS": 1, "SAVE_EVERY": 20}


@pytest.fixture
def small(monkeypatch):
    """A tiny model on 400 functions."""
    texts = gpt.functions()[:400]
    monkeypatch.setattr(gpt, "functions", lambda: texts)
    for name, value in SMALL.items():
        monkeypatch.setattr(gpt, name, value)


def test_it_learns_and_goes_on_bit_for_bit(small, monkeypatch, tmp_path, capsys):
    """The loss falls from log(128) = 4.85; a run stopped at update 40 ends at the very same."""
    monkeypatch.setattr(gpt, "UPDATES", 60)
    loss = gpt.main(folder=tmp_path)
    assert loss < 4.2
    assert f"test loss {loss:.3f} nats" in capsys.readouterr().out
    last = lk.Checkpointer(tmp_path).latest
    assert last.step == 60
    shutil.rmtree(last.path)
    assert lk.Checkpointer(tmp_path).latest.step == 40
    assert gpt.main(folder=tmp_path) == loss


def test_it_learns_the_same_compiled(small, monkeypatch, tmp_path):
    """By flag, the same numbers; lengths that change compile nothing again and again."""
    monkeypatch.setattr(gpt, "UPDATES", 4)
    plain = gpt.main(folder=tmp_path / "plain")
    torch.compiler.reset()
    compiled = gpt.main(backend="aot_eager", folder=tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_functions_are_whole_and_targets_follow():
    """At each place the next character is asked for; at most one in fifty cannot be parsed."""
    texts, broken = gpt.functions(), 0
    assert len(texts) > 2_000
    for inputs, targets in texts:
        assert torch.equal(inputs[1:], targets[:-1])
        assert inputs[0] == targets[-1] == gpt.END
        try:
            compile("".join(map(chr, inputs[1:])), "a function", "exec", ast.PyCF_ONLY_AST)
        except (SyntaxError, SyntaxWarning):
            broken += 1
    assert broken < len(texts) / 50


def test_padding_counts_for_nothing():
    """The loss and weight of functions of unlike lengths are those of their characters alone."""
    long, short = (torch.tensor([0, 65, 66, 67, 0]), torch.tensor([0, 68, 0]))
    a, b = ((text[:-1], text[1:]) for text in (long, short))
    state, pad = lk.TrainState(gpt.GPT()), lk.pad_collate({1: gpt.PADDING})
    parts = [gpt.train_step.function(state, pad([f])) for f in (a, b)]
    whole = gpt.train_step.function(state, pad([a, b]))
    assert [p["weight"].item() for p in (*parts, whole)] == [4, 2, 6]
    mean = sum(p["loss"] * p["weight"] for p in parts) / 6
    torch.testing.assert_close(whole["loss"], mean)


def on_ranks(strategy, folder, updates):
    """The example on one of several ranks."""
    import gpt as example

    texts = example.functions()[:400]
    example.functions, example.UPDATES = lambda: texts, updates
    for name, value in SMALL.items():
        setattr(example, name, value)
    return example.main(strategy, folder=folder)


def test_it_learns_on_two_ranks_and_goes_on_sharded(tmp_path):
    """Begun with DDP and gone on with FSDP2: the loss is that of both ranks, and has fallen."""
    first, second = POOL.run(2, on_ranks, "ddp", str(tmp_path), 30)
    assert first == second
    sharded, other = POOL.run(2, on_ranks, "fsdp", str(tmp_path), 40)
    assert sharded == other
    assert sharded < first < 4.4
