"""PPO on CartPole-v1, or on Pendulum-v1, whose action is continuous.

    pip install -c constraints.txt -e ".[examples-all]"
    python examples/ppo.py                      # the last 100 episodes return 475: 20 s of CPU
    python examples/ppo.py --env Pendulum-v1    # -200: 33 s of CPU

Stop it when you like and run it again: it goes on bit for bit, environments included. The end of
an episode by its limit of steps is no fall: the critic says what would have followed.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import gymnasium as gym
import loopkit as lk
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn import functional as F

CLIP, LAMBDA, ENTROPY, EPISODES = 0.2, 0.95, 0.01, 100


@attrs.frozen
class Recipe:
    """What differs between the tasks."""

    goal: float
    gamma: float
    horizon: int
    epochs: int
    rollouts: int
    lr: float = 1e-3
    environments: int = 8
    minibatches: int = 4


RECIPES = {
    "CartPole-v1": Recipe(goal=475, gamma=0.99, horizon=128, epochs=4, rollouts=300),
    "Pendulum-v1": Recipe(goal=-200, gamma=0.9, horizon=256, epochs=10, rollouts=150),
}


class Environments:
    """Copies of an environment and where each of them is, which a checkpoint keeps."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        make = partial(gym.make, name, disable_env_checker=True)
        self.vector = gym.vector.SyncVectorEnv([make] * count, autoreset_mode="SameStep")
        self.observations, _ = self.vector.reset(seed=seed)
        self.returns, self.steps, self.history = np.zeros(count), 0, []

    def step(self, actions: Tensor) -> tuple[Tensor, ...]:
        """What followed, the rewards, who fell, and whose episode is over: those begin anew."""
        self.observations, rewards, fallen, stopped, infos = self.vector.step(actions.numpy())
        following, over = self.observations.copy(), fallen | stopped
        self.steps, self.returns = self.steps + len(over), self.returns + rewards
        for i in np.flatnonzero(over):
            following[i] = infos["final_obs"][i]
            self.history.append((self.steps, float(self.returns[i])))
        self.returns[over] = 0
        return tuple(map(torch.from_numpy, (following, rewards.astype(np.float32), fallen, over)))

    def recent(self) -> float:
        """The mean return of the last hundred episodes."""
        last = [value for _, value in self.history[-EPISODES:]]
        return sum(last) / len(last) if len(last) == EPISODES else -np.inf

    def state_dict(self) -> dict:
        """Where each of them is, and how it will be begun anew."""
        return {
            "own": (self.observations, self.returns, self.steps, self.history),
            "states": self.vector.get_attr("state"),
            "elapsed": self.vector.get_attr("_elapsed_steps"),
            "rng": [generator.bit_generator.state for generator in self.vector.np_random],
        }

    def load_state_dict(self, saved: dict) -> None:
        """Put each where it was."""
        self.observations, self.returns, self.steps, self.history = saved["own"]
        self.vector.set_attr("state", saved["states"])
        self.vector.set_attr("_elapsed_steps", saved["elapsed"])
        for generator, state in zip(self.vector.np_random, saved["rng"], strict=True):
            generator.bit_generator.state = state


class Agent(nn.Module):
    """A network for what to do and one for what it is worth."""

    def __init__(self, seen: gym.spaces.Box, action: gym.spaces.Space) -> None:
        super().__init__()
        self.continuous = isinstance(action, gym.spaces.Box)
        choices = action.shape[0] if self.continuous else int(action.n)
        self.actor = network(seen.shape[0], choices, gain=0.01)
        self.critic = network(seen.shape[0], 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(choices)) if self.continuous else None

    def policy(self, observations: Tensor) -> Distribution:
        """How likely each action is."""
        chosen = self.actor(observations)
        if self.continuous:
            return Independent(Normal(chosen, self.log_std.exp()), 1)
        return Categorical(logits=chosen)

    def value(self, observations: Tensor) -> Tensor:
        """What is still to be earned."""
        return self.critic(observations).squeeze(-1)


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers, with orthogonal weights."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@torch.no_grad()
def collect(agent: Agent, environments: Environments, recipe: Recipe) -> list[Tensor]:
    """A rollout with its advantages: by how much better it went than the critic thought."""
    rollout = []
    for _ in range(recipe.horizon):
        seen = torch.from_numpy(environments.observations)
        policy = agent.policy(seen)
        actions = policy.sample()
        rollout.append((seen, actions, policy.log_prob(actions), *environments.step(actions)))
    columns = map(torch.stack, zip(*rollout, strict=True))
    seen, actions, log_probs, following, rewards, fallen, over = columns
    values = agent.value(seen)
    surprise = rewards + recipe.gamma * agent.value(following) * ~fallen - values
    advantages, ahead = torch.empty_like(surprise), 0.0
    for t in reversed(range(recipe.horizon)):
        advantages[t] = ahead = surprise[t] + recipe.gamma * LAMBDA * ahead * ~over[t]
    parts = (seen, actions, log_probs, advantages, advantages + values)
    return [part.flatten(0, 1) for part in parts]


@lk.with_clip(0.5)
def ppo_step(state: lk.TrainState, batch: list[Tensor]) -> dict[str, Tensor]:
    """One update: better actions, but no further from those taken than the clip allows."""
    seen, actions, log_probs, gain, returns = batch
    policy, gain = state.model.policy(seen), (gain - gain.mean()) / (gain.std() + 1e-8)
    ratio = (policy.log_prob(actions) - log_probs).exp()
    policy_loss = -torch.min(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value_loss, entropy = F.mse_loss(state.model.value(seen), returns), policy.entropy().mean()
    loss = policy_loss + 0.5 * value_loss - ENTROPY * entropy
    return {"loss": loss, "value_loss": value_loss, "entropy": entropy}


def improve(state: lk.TrainState, recipe: Recipe) -> Iterator[lk.TrainState]:
    """The state after each rollout and the updates from it."""
    environments = state.extras["environments"]
    updates = recipe.rollouts * recipe.epochs * recipe.minibatches
    step = lk.with_schedule(lr=lk.linear(updates, peak=recipe.lr))(ppo_step)
    while state.step < updates and environments.recent() < recipe.goal:
        rollout = collect(state.model, environments, recipe)
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(rollout[0])).chunk(recipe.minibatches):
                state = step(state, [part[rows] for part in rollout])
        yield state


def train(name: str, folder: Path, seed: int = 0, rollouts: float = np.inf) -> lk.TrainState:
    """Train, or go on with the training in the folder, to the goal or up to so many rollouts."""
    recipe = RECIPES[name]
    lk.seed_everything(seed)
    environments = Environments(name, recipe.environments, seed)
    vector = environments.vector
    agent = Agent(vector.single_observation_space, vector.single_action_space)
    optimizer = torch.optim.Adam(agent.parameters(), lr=recipe.lr, eps=1e-5)
    state = lk.TrainState(agent, optimizer, environments=environments)
    with lk.Checkpointer(folder, every="30s") as checkpoints:
        checkpoints.restore(state)
        for state in checkpoints.wrap(improve(state, recipe)):
            rollout = state.step // (recipe.epochs * recipe.minibatches)
            if rollout % 10 == 0:
                print(f"{environments.steps} steps: return {environments.recent():.0f}")
            if rollout >= rollouts:
                break
    return state


def draw(history: list[tuple[int, float]], goal: float, picture: Path) -> None:
    """The return of each episode, and the mean of each hundred."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    steps, returns = np.array(history).T
    axes.scatter(steps, returns, s=3, alpha=0.3, color="tab:blue", label="an episode")
    means = np.convolve(returns, np.ones(EPISODES) / EPISODES, mode="valid")
    axes.plot(steps[EPISODES - 1 :], means, color="tab:blue", label="mean of the last 100")
    axes.axhline(goal, color="gray", ls="--", lw=0.8, label="goal")
    axes.set(xlabel="steps of the environments", ylabel="return")
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Train, and draw what came of it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--env", choices=RECIPES, default="CartPole-v1")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--runs", type=Path, default=Path("runs/ppo"))
    given = arguments.parse_args()
    torch.set_num_threads(1)  # networks so small are slower on several
    state = train(given.env, given.runs / f"{given.env}-{given.seed}", given.seed)
    environments, picture = state.extras["environments"], given.runs / f"{given.env}.png"
    draw(environments.history, RECIPES[given.env].goal, picture)
    print(f"the last {EPISODES} episodes returned {environments.recent():.0f}; {picture.resolve()}")


if __name__ == "__main__":
    main()
