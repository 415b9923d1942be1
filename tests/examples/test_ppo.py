"""PPO learns, and goes on bit for bit with its environments where it was stopped."""

import loopkit as lk
import numpy as np
import pytest
import torch

from trainings import digest_of

pytest.importorskip("gymnasium", reason="of the extra examples-all")
import ppo


@pytest.fixture
def small(monkeypatch):
    """Rollouts that take little time."""
    for name, value in {"COPIES": 4, "HORIZON": 64, "PASSES": 4}.items():
        monkeypatch.setattr(ppo, name, value)


@pytest.mark.parametrize("name", ppo.TASKS)
def test_stopped_and_gone_on_with_it_is_the_uninterrupted_training(small, tmp_path, name):
    """Weights, optimizer, random numbers, episodes that had begun: all equal bit for bit."""
    whole = ppo.train(name, tmp_path / "whole", until=5)
    for rollouts in (2, 3, 5):  # stopped twice; within episodes, which last up to 200 steps
        state = ppo.train(name, tmp_path / "cut", until=rollouts)
    assert any(whole.extras["environments"].vector.get_attr("_elapsed_steps"))
    assert digest_of(state) == digest_of(whole)


def test_it_learns_to_balance_the_pole_and_draws(monkeypatch, tmp_path, capsys):
    """Within 20,480 steps the mean of the last hundred episodes is over 60; chance gets 22."""
    monkeypatch.setitem(ppo.TASKS, "CartPole-v1", (60, 0.99))
    state = ppo.train("CartPole-v1", tmp_path, until=10)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert float(capsys.readouterr().out.split("returned ")[1].split(";")[0]) >= 60
    again = ppo.train("CartPole-v1", tmp_path)  # has nothing left to do
    assert again.step == state.step


def test_advantages_are_the_sums_of_surprises(small):
    """As the paper writes them: each surprise ahead in the episode, discounted."""
    lk.seed_everything(0)
    envs = ppo.Environments("CartPole-v1")
    agent = ppo.Agent(envs.vector.single_observation_space, envs.vector.single_action_space)
    taken, step = [], envs.step
    envs.step = lambda actions: taken.append([*step(actions)]) or taken[-1]
    rollout = ppo.collect(agent, envs, 0.99)
    following, rewards, fell, over = map(torch.stack, zip(*taken, strict=True))
    seen, *_, advantages, _ = (part.unflatten(0, (ppo.HORIZON, ppo.COPIES)) for part in rollout)
    with torch.no_grad():
        values, ahead = agent(seen)[1], agent(following)[1]
    surprises = rewards + 0.99 * ahead.where(~fell, 0) - values
    assert over.any()
    for i in range(ppo.COPIES):
        for t in range(ppo.HORIZON):
            ends = (u for u in range(t, ppo.HORIZON) if over[u, i])
            end = next(ends, ppo.HORIZON - 1)
            powers = (0.99 * ppo.LAMBDA) ** np.arange(end - t + 1)
            expected = float(surprises[t : end + 1, i].numpy() @ powers)
            assert advantages[t, i] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_an_episode_that_reached_its_limit_of_steps_has_not_fallen():
    """Pendulums never fall; after 200 steps all begin anew, from where `following` is not."""
    envs = ppo.Environments("Pendulum-v1")
    for _ in range(200):
        assert len(envs.last) == 1
        following, _, fallen, over = envs.step(torch.zeros(ppo.COPIES, 1))
    assert over.all()
    assert not fallen.any()
    assert not np.allclose(following, envs.seen)
    assert len(envs.last) == 1 + ppo.COPIES
