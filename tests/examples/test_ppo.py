"""PPO learns, and goes on bit for bit with its environments where it was stopped."""

import attrs
import loopkit as lk
import numpy as np
import pytest
import torch

from trainings import digest_of

pytest.importorskip("gymnasium", reason="of the extra examples-all")
import ppo

SMALL = {"rollouts": 12, "environments": 4, "horizon": 64}


@pytest.fixture
def small(monkeypatch):
    """Recipes that take seconds."""
    recipes = {name: attrs.evolve(recipe, **SMALL) for name, recipe in ppo.RECIPES.items()}
    monkeypatch.setattr(ppo, "RECIPES", recipes)


@pytest.mark.parametrize("name", ppo.RECIPES)
def test_stopped_and_gone_on_with_it_is_the_uninterrupted_training(small, tmp_path, name):
    """Weights, optimizer, random numbers, episodes that had begun: all equal bit for bit."""
    whole = ppo.train(name, tmp_path / "whole", rollouts=5)
    for rollouts in (2, 3, 5):  # stopped twice; within episodes, which last up to 200 steps
        state = ppo.train(name, tmp_path / "cut", rollouts=rollouts)
    assert any(whole.extras["environments"].vector.get_attr("_elapsed_steps"))
    assert digest_of(state) == digest_of(whole)


def test_it_learns_to_balance_the_pole_and_draws(monkeypatch, tmp_path, capsys):
    """Within 16,000 steps the mean of the last hundred episodes is over 60; chance gets 22."""
    recipe = attrs.evolve(ppo.RECIPES["CartPole-v1"], goal=60, rollouts=60)
    monkeypatch.setitem(ppo.RECIPES, "CartPole-v1", recipe)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--runs", str(tmp_path)])
    ppo.main()
    assert (tmp_path / "CartPole-v1.png").read_bytes().startswith(b"\x89PNG")
    assert float(capsys.readouterr().out.split("returned ")[1].split(";")[0]) >= 60
    state = ppo.train("CartPole-v1", tmp_path / "CartPole-v1-0")  # has nothing left to do
    assert state.extras["environments"].steps <= 16 * 1024


def test_advantages_are_the_sums_of_surprises(small):
    """As the paper writes them: each surprise ahead in the episode, discounted."""
    lk.seed_everything(0)
    recipe = ppo.RECIPES["CartPole-v1"]
    environments = ppo.Environments("CartPole-v1", recipe.environments, seed=0)
    vector = environments.vector
    agent = ppo.Agent(vector.single_observation_space, vector.single_action_space)
    taken, step = [], environments.step
    environments.step = lambda actions: taken.append(step(actions)) or taken[-1]
    rollout = ppo.collect(agent, environments, recipe)
    following, rewards, fell, over = map(torch.stack, zip(*taken, strict=True))
    seen, *_, advantages, _ = (
        part.unflatten(0, (recipe.horizon, recipe.environments)) for part in rollout
    )
    with torch.no_grad():
        values, ahead = agent.value(seen), agent.value(following)
    surprises = rewards + recipe.gamma * ahead.where(~fell, 0) - values
    assert over.any()
    for i in range(recipe.environments):
        for t in range(recipe.horizon):
            ends = (u for u in range(t, recipe.horizon) if over[u, i])
            end = next(ends, recipe.horizon - 1)
            powers = (recipe.gamma * ppo.LAMBDA) ** np.arange(end - t + 1)
            expected = float(surprises[t : end + 1, i].numpy() @ powers)
            assert advantages[t, i] == pytest.approx(expected, rel=1e-4, abs=1e-4)
