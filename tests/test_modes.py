"""Evaluating leaves modes, random numbers and the training as they were."""

import random

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.modes import scratch_statistics
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from feeds import finish, numbered, tiny_state
from problems import classifier, make_batches, make_state, mlp


def scored(state, batch):
    logits = state.model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "preds": logits, "target": batch[1]}


def test_a_model_used_by_hand_is_in_eval_mode_without_gradients_and_then_as_it_was():
    """With the averages where they are asked for; each module's mode comes back, also on error."""
    state = lk.TrainState(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    state.model[1].eval()
    with lk.inference(state) as model:
        assert model is state.model
        assert not any(module.training for module in model.modules())
        kept = model(torch.ones(2, 4))
    assert not kept.requires_grad
    assert [m.training for m in state.model.modules()] == [True, True, False, True]
    (nn.Linear(4, 1)(kept).sum()).backward()  # as a rollout's values go into a loss
    with pytest.raises(ArithmeticError), lk.inference(state):
        raise ArithmeticError
    assert [m.training for m in state.model.modules()] == [True, True, False, True]
    with pytest.raises(lk.UsageError, match="a Linear as the state"), lk.inference(nn.Linear(1, 1)):
        pass


def test_inference_uses_the_averages_where_they_are_swapped_in():
    """The two contexts compose in either order, and both are undone."""
    step, state, batches = lk.with_ema(0.5)(scored), make_state(), make_batches()
    finish(lk.run(step, state, batches, max_steps=3))
    inputs = batches[0][0]
    with lk.inference(state) as model:
        trained = model(inputs)
    with lk.ema_weights(state), lk.inference(state) as model:
        averaged = model(inputs)
    with lk.inference(state) as model, lk.ema_weights(state):
        assert torch.equal(model(inputs), averaged)
    assert not torch.equal(trained, averaged)
    with lk.inference(state) as model:
        assert torch.equal(model(inputs), trained)


def test_every_module_gets_its_own_mode_back():
    """Frozen parts stay frozen, and modules among the extras are treated alike, also on error."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[1].eval()
    teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).eval()
    teacher[1].train()
    state = lk.TrainState(model, critic=nn.Dropout(), teacher=teacher, notes="text")
    modules = [*model.modules(), *teacher.modules(), state.extras["critic"]]
    before, during = [m.training for m in modules], []

    def step(state, batch):
        during.extend(m.training for m in modules)
        if batch[0].sum() > 1e6:
            raise ArithmeticError("too large")
        return F.cross_entropy(state.model(batch[0]), batch[1])

    statistics = model[1].running_mean.clone()
    lk.evaluate(step, state, make_batches(3))
    assert [m.training for m in modules] == before
    with pytest.raises(ArithmeticError):
        lk.evaluate(step, state, [(torch.full((2, 4), 1e9), torch.tensor([0, 1]))])
    assert [m.training for m in modules] == before
    assert not any(during)
    assert torch.equal(model[1].running_mean, statistics)


class Noisy(Dataset):
    """Samples that take random numbers from everywhere."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(4) + random.random() + float(np.random.rand()), index % 3


@pytest.mark.parametrize("shared", [False, True], ids=["own generator", "shared generator"])
def test_evaluating_in_the_middle_does_not_change_the_training(shared):
    """Training with evaluations at every update equals training without, bit for bit."""
    finals = []
    for evaluating in (False, True):
        generator = lk.seed_everything(3)
        model = nn.Sequential(mlp(dropout=0.3), nn.BatchNorm1d(3))
        state = lk.TrainState(model, torch.optim.AdamW(model.parameters()))
        step = lk.compose(lk.with_grad_accum(2), lk.with_ema(0.9), lk.with_clip(1.0))(classifier)
        train = DataLoader(Noisy(), 2, shuffle=True, generator=generator)
        val = DataLoader(Noisy(), 2, shuffle=True, generator=generator if shared else None)
        for state in lk.run(step, state, train, max_epochs=3):
            if evaluating:
                lk.evaluate(classifier, state, val, inference_mode=state.step % 2 == 0)
                lk.evaluate(scored, state, {"val": val}, MulticlassAccuracy(3))
        finals.append((state.state_dict(), torch.rand(3), random.random(), np.random.rand()))
    assert_bitwise_equal(*finals)


def test_averaged_weights_are_evaluated_in_their_place():
    """Within ema_weights the averages are measured, and the training goes on as before."""
    state = make_state()
    step = lk.with_ema(0.9)(classifier)
    finish(lk.run(step, state, make_batches(), max_epochs=1))
    plain = lk.evaluate(classifier, state, make_batches())
    with lk.ema_weights(state):
        assert lk.evaluate(classifier, state, make_batches()) != plain
    assert lk.evaluate(classifier, state, make_batches()) == plain


def test_inference_mode_or_no_grad():
    """By default tensors are inference tensors; with no_grad they can be used in autograd later."""
    found = []

    def step(state, x):
        found.append((x * 1).is_inference())
        assert not torch.is_grad_enabled()
        return state.model(x).mean()

    lk.evaluate(step, tiny_state(), numbered(1))
    lk.evaluate(step, tiny_state(), numbered(1), inference_mode=False)
    assert found == [True, False]


def test_running_statistics_of_a_scratch_pass_are_thrown_away():
    """The buffers are the same objects with the same values after it, also after an error."""
    norm = nn.BatchNorm1d(3)
    before = {name: (buffer, buffer.clone()) for name, buffer in norm.named_buffers()}
    with scratch_statistics(nn.Sequential(norm, nn.BatchNorm1d(3, track_running_stats=False))) as n:
        assert [*n.values()] == [norm]
        norm(torch.randn(4, 3))
        assert norm.num_batches_tracked == 1
    with pytest.raises(ZeroDivisionError), scratch_statistics(norm):
        norm(torch.randn(4, 3))
        raise ZeroDivisionError
    for name, buffer in norm.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
