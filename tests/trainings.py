"""Small trainings for the tests of checkpoints, and a digest that says if two are equal."""

import functools
import hashlib
import random
from collections.abc import Mapping

import loopkit as lk
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def noisy(state, batch):
    """A loss that depends on the random numbers of torch, NumPy and Python."""
    inputs, labels = batch
    inputs = inputs + 0.01 * np.random.rand() + 0.01 * random.random()
    return F.cross_entropy(state.model(inputs), labels)


def make_model():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    )


def make_state(optimizer="adamw", seed=0, **extras):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = make_model()
    optimizers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }
    return lk.TrainState(model, optimizers[optimizer](model.parameters()), **extras)


@functools.cache
def make_batches(count=7, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


STEPS = {
    "plain": lk.train_step(noisy),
    "ema": lk.with_ema(0.8)(noisy),
    "fp16": lk.with_amp("fp16", init_scale=2.0**20)(noisy),
    "schedule": lk.with_schedule(lr=lambda n: 0.02 * 0.9**n)(noisy),
    "scheduler": lk.with_schedule(
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    )(noisy),
    "all": lk.compose(
        lk.with_ema(0.8),
        lk.with_clip(0.3),
        lk.with_grad_accum(2),
        lk.with_amp("fp16"),
        lk.with_nonfinite("skip"),
        lk.with_schedule(lr=lambda n: 0.02 * 0.9**n),
    )(noisy),
}


def train(state, updates, step="plain", batches=None):
    """Go on for a number of updates."""
    batches = batches or make_batches()
    for _ in lk.run(STEPS[step], state, batches, max_steps=state.step + updates):
        pass
    return state


def digest(value):
    """Equal for values that are equal bit for bit and type for type, else different."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha, value):
    sha.update(f"{type(value).__qualname__}(".encode())
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif isinstance(value, set | frozenset):
        for item in sorted(value, key=repr):
            _feed(sha, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(sha, item)
    elif isinstance(value, np.ndarray):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        sha.update(repr(value).encode())
    sha.update(b")")


def digest_of(state):
    return digest(state.state_dict())


def restored(folder, which="latest", **settings):
    """The digest of a new state that was restored from the folder; None if nothing was there."""
    state = make_state(seed=99)
    found = lk.Checkpointer(folder, **settings).restore(state, which)
    return digest_of(state) if found else None
