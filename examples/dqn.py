"""DQN on CartPole-v1: a replay buffer, a target network, and double Q-learning.

    pip install -c constraints.txt -e ".[examples-all]"
    python examples/dqn.py      # 45 s of CPU; the best network returns 500 of 500

Every 2,000 steps the network plays without exploring, and the best is kept: DQN forgets as it
learns, and the last is often not the best. Stop it when you like and run it again: it goes on bit
for bit, with its buffer, its target and the very episode.
Sources: Mnih et al. 2015, https://doi.org/10.1038/nature14236; van Hasselt et al. 2016,
https://arxiv.org/abs/1509.06461.
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import loopkit as lk
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, WARM, ROUND, UPDATES = 50_000, 1_000, 250, 125  # in all; random; then play 250, learn 125
BATCH, GAMMA, LR, TEST_EVERY, GOAL = 64, 0.99, 2.3e-3, 2_000, 475
EXPLORE = lk.linear(8_000, peak=1.0, floor=0.04)  # the chance of a random action, by the step


class Game:
    """An environment that can be saved in the middle of an episode."""

    def __init__(self, seed: int) -> None:
        self.env = gym.make("CartPole-v1", disable_env_checker=True)
        self.observation, _ = self.env.reset(seed=seed)

    def step(self, action: int) -> tuple:
        """What was seen, done, earned and seen then, and whether the pole fell."""
        before = self.observation
        after, reward, fallen, stopped, _ = self.env.step(action)
        self.observation = self.env.reset()[0] if fallen or stopped else after
        return before, action, reward, after, fallen

    def state_dict(self) -> dict:
        """Where the episode is, and how the next will begin."""
        inside = {k: self.env.get_wrapper_attr(k) for k in ("state", "_elapsed_steps")}
        rng = self.env.unwrapped.np_random.bit_generator.state
        return {"observation": self.observation, "rng": rng, "inside": inside}

    def load_state_dict(self, saved: dict) -> None:
        """Go on with the episode."""
        self.observation = saved["observation"]
        self.env.unwrapped.np_random.bit_generator.state = saved["rng"]
        for name, value in saved["inside"].items():
            self.env.set_wrapper_attr(name, value)


class Replay:
    """All steps that were played, to learn from again and again."""

    def __init__(self) -> None:
        self.size, flags = 0, torch.zeros(STEPS, dtype=torch.bool)
        seen, actions = torch.zeros(STEPS, 4), torch.zeros(STEPS, dtype=torch.int64)
        self.columns = [seen, actions, torch.zeros(STEPS), seen.clone(), flags]

    def add(self, step: tuple) -> None:
        """Keep a step."""
        for column, value in zip(self.columns, step, strict=True):
            column[self.size] = torch.as_tensor(value)
        self.size += 1

    def sample(self) -> list[Tensor]:
        """A batch of steps from any time."""
        rows = torch.randint(self.size, (BATCH,))
        return [column[rows] for column in self.columns]

    def state_dict(self) -> dict:
        """What was played so far."""
        return {"columns": [column[: self.size] for column in self.columns]}

    def load_state_dict(self, saved: dict) -> None:
        """Take it back."""
        self.size = len(saved["columns"][0])
        for column, values in zip(self.columns, saved["columns"], strict=True):
            column[: self.size] = values


@lk.with_clip(10.0)
def dqn_step(state: lk.TrainState, batch: list[Tensor]) -> Tensor:
    """One update towards what the target network thinks the action was worth."""
    before, actions, rewards, after, fallen = batch
    worth = state.model(before).gather(1, actions[:, None]).squeeze(1)
    with torch.no_grad():
        best = state.model(after).argmax(1, keepdim=True)
        ahead = state.extras["target"](after).gather(1, best).squeeze(1)
    return F.smooth_l1_loss(worth, rewards + GAMMA * ahead * ~fallen)


def learn(state: lk.TrainState) -> Iterator[lk.TrainState]:
    """The state after each round of playing and learning."""
    game, replay, target = (state.extras[name] for name in ("game", "replay", "target"))
    while replay.size < STEPS:
        for _ in range(ROUND):
            action = int(torch.randint(2, ()))
            if torch.rand(()) > EXPLORE(replay.size):
                with torch.no_grad():
                    action = int(state.model(torch.from_numpy(game.observation)).argmax())
            replay.add(game.step(action))
        for _ in range(UPDATES if replay.size > WARM else 0):
            state = dqn_step(state, replay.sample())
        target.load_state_dict(state.model.state_dict())
        yield state


@torch.no_grad()
def play(model: nn.Module, episodes: int, seed: int) -> float:
    """The mean return of some episodes, always with the best action."""
    envs = gym.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")
    (observations, _), total, running = envs.reset(seed=seed), 0.0, np.ones(episodes, dtype=bool)
    while running.any():
        actions = model(torch.from_numpy(observations)).argmax(1).numpy()
        observations, rewards, fallen, stopped, _ = envs.step(actions)
        total += rewards[running].sum()
        running &= ~(fallen | stopped)
    return total / episodes


def train(folder: Path, seed: int = 0, until: int = STEPS) -> lk.TrainState:
    """Train up to a step of the environment."""
    lk.seed_everything(seed)
    model = nn.Sequential(
        nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    )
    parts = {"target": deepcopy(model), "game": Game(seed), "replay": Replay(), "history": []}
    state = lk.TrainState(model, torch.optim.Adam(model.parameters(), lr=LR), **parts)
    with lk.Checkpointer(folder, monitor="return", mode="max") as checkpoints:
        checkpoints.restore(state)
        for state in learn(state):
            steps = state.extras["replay"].size
            if steps % TEST_EVERY == 0:
                score = play(state.model, episodes=20, seed=1)
                state.extras["history"].append((steps, score))
                print(f"{steps} steps: return {score:.0f}")
                checkpoints.save(state, {"return": score})
            if steps >= until:
                break
    return state


def draw(history: list[tuple[int, float]], picture: Path) -> None:
    """What the network returned whenever it was tried."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(*zip(*history, strict=True), marker="o", ms=3)
    axes.axhline(GOAL, color="gray", ls="--", lw=0.8)
    axes.set(title="20 episodes without exploring; dashed: the goal")
    axes.set(xlabel="steps of the environment", ylabel="mean return")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Train, take the best, and try it on episodes that did not choose it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--runs", type=Path, default=Path("runs/dqn"))
    given = arguments.parse_args()
    torch.set_num_threads(1)  # networks so small are slower on several
    state = train(given.runs / f"seed-{given.seed}", given.seed)
    draw(state.extras["history"], given.runs / "dqn.png")
    lk.load_best(state)
    print(f"the best network, 100 new episodes: {play(state.model, 100, seed=2):.0f}")


if __name__ == "__main__":
    main()
