"""A run that was stopped within an epoch goes on from its checkpoint with what was left."""

import gc
import multiprocessing

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from problems import classifier

STEP = lk.compose(lk.with_ema(0.9), lk.with_clip(1.0), lk.with_grad_accum(2))(classifier)


def make(workers):
    """A fresh process: the state and the loader as a script makes them."""
    lk.seed_everything(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters()))
    inputs, labels = torch.randn(37, 4), torch.randint(3, (37,))
    loader = DataLoader(TensorDataset(inputs, labels), 3, shuffle=True, num_workers=workers)
    return state, loader


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_any_update_and_restored_twice_the_run_is_the_same(tmp_path, workers):
    """Weights, optimizer, averages and clock end as in the run that was never stopped."""
    whole, loader = make(workers)
    for _ in lk.run(STEP, whole, loader, max_epochs=2):
        pass
    for stop in (1, 5, 7, 9) if workers == 0 else (3,):
        folder = tmp_path / str(stop)
        for most in (stop, stop + 3, None):
            state, loader = make(workers)
            if most != stop:
                torch.rand(7)  # what else a script may draw before it restores
            with lk.Checkpointer(folder) as checkpoints:
                assert checkpoints.restore(state) == (most != stop)
                assert [*lk.run(STEP, state, loader, max_steps=most, max_epochs=2)]
                checkpoints.save(state)
        for part in ("model", "optimizer", "features", "clock"):
            assert_bitwise_equal(state.state_dict()[part], whole.state_dict()[part], part)


def test_a_break_ends_the_run_within_at_once(tmp_path):
    """A loop that is left over a wrapped run leaves no data workers to the garbage collector."""
    gc.disable()
    try:
        state, loader = make(2)
        before = len(multiprocessing.active_children())
        with lk.Checkpointer(tmp_path, every=100) as checkpoints:
            for _ in checkpoints.wrap(lk.run(STEP, state, loader)):
                break
        assert len(multiprocessing.active_children()) == before
    finally:
        gc.enable()
