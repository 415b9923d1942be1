"""DQN learns, and goes on bit for bit with buffer, target and episode where it was stopped."""

import loopkit as lk
import pytest
import torch

from trainings import digest_of

pytest.importorskip("gymnasium", reason="of the extra examples-all")
import dqn


@pytest.fixture
def short(monkeypatch):
    """A training that takes seconds."""
    monkeypatch.setattr(dqn, "STEPS", 1_000)


def test_stopped_and_gone_on_with_it_is_the_uninterrupted_training(short, tmp_path):
    """Whatever it is made of is equal bit for bit, the replay buffer included."""
    whole = dqn.train(tmp_path / "whole", epochs=2)
    for epochs in (1, 2):
        state = dqn.train(tmp_path / "cut", epochs=epochs)
    assert len(whole.extras["replay"]) >= 2_000
    assert digest_of(state) == digest_of(whole)


def test_its_best_is_better_than_chance(short, tmp_path):
    """The best of five tries balances for more than 100 steps; chance gets 22."""
    state = dqn.train(tmp_path, epochs=5)
    assert lk.Checkpointer(tmp_path, monitor="return", mode="max").best.scores["return"] > 100
    lk.load_best(state)
    env = dqn.gym.make("CartPole-v1")
    assert dqn.mean(len(dqn.play(env, state.model, seed)) for seed in range(100, 110)) > 100


def test_its_loss_is_that_of_the_papers(tmp_path):
    """Of one step at a time: its worth against the reward and what the target says of the best."""
    lk.seed_everything(0)
    state = dqn.train(tmp_path, epochs=0)
    target = state.extras["target"]
    torch.nn.init.normal_(target[0].weight)
    rows = torch.cat([dqn.play(dqn.gym.make("CartPole-v1"), state.model, 0, 1.0) for _ in "ab"])
    assert rows[:, -1].sum() == 2
    losses = []
    for row in rows:
        before, after, action, fallen = row[:4], row[6:10], int(row[4]), bool(row[10])
        ahead = 0.0 if fallen else 0.99 * target(after)[state.model(after).argmax()].item()
        wanted = torch.tensor(row[5].item() + ahead)
        losses.append(torch.nn.functional.smooth_l1_loss(state.model(before)[action], wanted))
    torch.testing.assert_close(dqn.dqn_step.function(state, rows), torch.stack(losses).mean())
