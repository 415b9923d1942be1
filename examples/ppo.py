"""PPO on CartPole-v1, and on Pendulum-v1, whose action is continuous.

    python examples/ppo.py      # with the extra examples-all

The last 100 episodes return 475 after 20 s of processor time, and -196 after another 28 s.
Stop it when you like and run it again: it goes on bit for bit, environments included.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347
"""

from copy import deepcopy

import gymnasium as gym
import loopkit as lk
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional as F

TASKS = {"CartPole-v1": (475, 0.99), "Pendulum-v1": (-200, 0.9)}  # the goal, and gamma
COPIES, HORIZON, PASSES, MINIBATCHES, ROLLOUTS = 8, 256, 10, 4, 150
PEAK_LR, CLIP, LAMBDA, ENTROPY = 1e-3, 0.2, 0.95, 0.01


class Environments:
    """Copies of an environment and where each of them is, which a checkpoint keeps."""

    def __init__(self, name):
        self.vector = gym.make_vec(name, COPIES, "sync", {"autoreset_mode": "Disabled"})
        self.seen, _ = self.vector.reset(seed=0)
        self.returns, self.last = np.zeros(COPIES), [-np.inf]  # and of the last 100 episodes

    def step(self, actions):
        """What followed, the rewards, who fell, and whose episode is over: those begin anew."""
        following, rewards, fallen, stopped, _ = self.vector.step(actions.numpy())
        over, self.seen = fallen | stopped, following
        if over.any():
            self.seen, _ = self.vector.reset(options={"reset_mask": over})
        self.returns += rewards
        self.last = [*self.last, *self.returns[over].tolist()][-100:]
        self.returns[over] = 0
        return map(torch.from_numpy, (following, rewards.astype(np.float32), fallen, over))

    def state_dict(self):
        """Where each of them is, and how it will be begun anew."""
        dice = [generator.bit_generator.state for generator in self.vector.np_random]
        inside = {name: self.vector.get_attr(name) for name in ("state", "_elapsed_steps")}
        return {"own": (self.seen, self.returns, self.last), "dice": dice, "inside": inside}

    def load_state_dict(self, saved):
        """Put each where it was."""
        self.seen, self.returns, self.last = saved["own"]
        for name, values in saved["inside"].items():
            self.vector.set_attr(name, values)
        for generator, dice in zip(self.vector.np_random, saved["dice"], strict=True):
            generator.bit_generator.state = dice


class Agent(nn.Module):
    """A network for what to do, and one for what is still to be earned."""

    def __init__(self, seen, action):
        super().__init__()
        hidden = nn.Linear(seen.shape[0], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
        self.actor = nn.Sequential(*hidden, nn.Linear(64, gym.spaces.flatdim(action)))
        self.critic = nn.Sequential(*deepcopy(hidden), nn.Linear(64, 1))
        self.log_std = nn.Parameter(torch.zeros(action.shape)) if action.shape else None

    def forward(self, seen):
        """How likely each action is, and the value."""
        chosen, value = self.actor(seen), self.critic(seen).squeeze(-1)
        if self.log_std is None:
            return Categorical(logits=chosen), value
        return Independent(Normal(chosen, self.log_std.exp()), 1), value


@torch.no_grad()
def collect(agent, environments, gamma):
    """A rollout with its advantages: by how much better it went than the critic thought."""
    steps = []
    for _ in range(HORIZON):
        seen = torch.from_numpy(environments.seen)
        policy, value = agent(seen)
        actions = policy.sample()
        following, rewards, fallen, over = environments.step(actions)
        surprise = rewards + gamma * agent(following)[1] * ~fallen - value
        steps.append((seen, actions, policy.log_prob(actions), value, surprise, over))
    seen, actions, log_probs, values, surprise, over = map(torch.stack, zip(*steps, strict=True))
    advantages, ahead = torch.empty_like(surprise), 0.0
    for t in reversed(range(HORIZON)):
        advantages[t] = ahead = surprise[t] + gamma * LAMBDA * ahead * ~over[t]
    return [p.flatten(0, 1) for p in (seen, actions, log_probs, advantages, advantages + values)]


@lk.with_clip(0.5)
@lk.with_schedule(lr=lk.linear(ROLLOUTS * PASSES * MINIBATCHES, peak=PEAK_LR))
def ppo_step(state, batch):
    """One update: better actions, but no further from those taken than the clip allows."""
    seen, actions, log_probs, gain, returns = batch
    policy, value = state.model(seen)
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    ratio = (policy.log_prob(actions) - log_probs).exp()
    policy_loss = -torch.min(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value_loss, entropy = F.mse_loss(value, returns), policy.entropy().mean()
    loss = policy_loss + 0.5 * value_loss - ENTROPY * entropy
    return {"loss": loss, "value loss": value_loss, "entropy": entropy}


def train(name, folder, until=ROLLOUTS):
    """Train, or go on with the training in the folder, to the goal or that rollout."""
    lk.seed_everything(0)
    envs, (goal, gamma) = Environments(name), TASKS[name]
    agent = Agent(envs.vector.single_observation_space, envs.vector.single_action_space)
    state = lk.TrainState(agent, torch.optim.Adam(agent.parameters()), environments=envs)
    with lk.Checkpointer(folder) as checkpoints, lk.Log(folder) as log:
        checkpoints.restore(state)
        while state.epoch < until and np.mean(envs.last) < goal:
            rollout = collect(agent, envs, gamma)
            for _ in range(PASSES):
                for rows in torch.randperm(HORIZON * COPIES).chunk(MINIBATCHES):
                    state = ppo_step(state, [part[rows] for part in rollout])
            state.epoch += 1  # of rollouts: in a loop of your own it is yours to count
            log(state, **state.metrics, **{"return": np.mean(envs.last)})
            checkpoints.save(state)
            if state.epoch % 10 == 0:
                print(f"{name}, rollout {state.epoch}: return {np.mean(envs.last):.0f}")
    picture = lk.plot(folder, metrics=["return", "entropy"])
    print(f"{name}: the last 100 episodes returned {np.mean(envs.last):.0f}; {picture}")
    return state


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks so small are slower on several
    for task in TASKS:
        train(task, f"runs/ppo/{task}")
