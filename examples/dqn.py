"""DQN on CartPole-v1: a replay buffer, a target network, and double Q-learning.

    python examples/dqn.py      # with the extra examples-all

The best network returns 500 of 500 after 45 s of processor time. Every 2,000 steps it plays without
exploring, and the best is kept, for DQN forgets as it learns. Stop it when you like and run it
again: it goes on bit for bit. The buffer is plain data, which a checkpoint holds as it is, and an
episode begins from the number of steps that were played, so environments need no saving.
Sources: Mnih et al. 2015, https://doi.org/10.1038/nature14236; van Hasselt et al. 2016,
https://arxiv.org/abs/1509.06461
"""

from copy import deepcopy
from statistics import mean

import gymnasium as gym
import loopkit as lk
import torch
from torch import nn
from torch.nn import functional as F

EPOCHS, STEPS, BATCH, GAMMA, LR = 25, 2_000, 64, 0.99, 2.3e-3
TARGET_EVERY = 125  # updates, of which there is one for two steps
EXPLORE = lk.linear(8_000, peak=1.0, floor=0.04)  # the chance of a random action, by the step


@torch.no_grad()
def play(env, model, seed, explore=0.0):
    """An episode, a row a step: what was seen, done, earned and seen then; and whether it fell."""
    (seen, _), rows, over = env.reset(seed=seed), [], False
    while not over:
        action = int(model(torch.from_numpy(seen)).argmax())
        if torch.rand(()) < explore:
            action = int(torch.randint(2, ()))
        after, reward, fallen, stopped, _ = env.step(action)
        rows.append(torch.tensor([*seen, action, reward, *after, fallen]))
        seen, over = after, fallen or stopped
    return torch.stack(rows)


@lk.with_clip(10.0)
def dqn_step(state, rows):
    """One update towards what the target network thinks the action was worth."""
    before, actions, rewards, after, fallen = rows.split([4, 1, 1, 4, 1], dim=1)
    worth = state.model(before).gather(1, actions.long())
    with torch.no_grad():
        best = state.model(after).argmax(1, keepdim=True)
        ahead = state.extras["target"](after).gather(1, best)
    return F.smooth_l1_loss(worth, rewards + GAMMA * ahead * (1 - fallen))


def train(folder, epochs=EPOCHS):
    """Train, or go on with the training in the folder; an epoch is 2,000 steps, and a test."""
    lk.seed_everything(0)
    env, layers = gym.make("CartPole-v1"), (nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    state = lk.TrainState(model, optimizer, target=deepcopy(model), replay=torch.empty(0, 11))
    with lk.Checkpointer(folder, monitor="return", mode="max") as saved, lk.Log(folder) as log:
        saved.restore(state)
        while state.epoch < epochs:
            while (played := len(state.extras["replay"])) < (state.epoch + 1) * STEPS:
                episode = play(env, model, seed=played, explore=EXPLORE(played))
                state.extras["replay"] = replay = torch.cat([state.extras["replay"], episode])
                for _ in range(len(episode) // 2):
                    state = dqn_step(state, replay[torch.randint(len(replay), (BATCH,))])
                    if state.step % TARGET_EVERY == 0:
                        state.extras["target"].load_state_dict(model.state_dict())
            state.epoch += 1  # in a loop of your own it is yours to count
            score = mean(len(play(env, model, seed)) for seed in range(20))
            print(f"{len(replay)} steps: return {score:.0f}")
            log(state, **{"return": score})
            saved.save(state, {"return": score})
    return state


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks so small are slower on several
    state, env = train("runs/dqn"), gym.make("CartPole-v1")
    lk.load_best(state)
    score = mean(len(play(env, state.model, seed)) for seed in range(100, 200))
    print(f"the best network, 100 new episodes: {score:.0f}; {lk.plot('runs/dqn')}")
