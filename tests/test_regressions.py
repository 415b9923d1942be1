"""Faults that reviews have found: each was wrong once, and stays mended."""

import copy
import functools
import math

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

from problems import classifier, make_batches, make_state

SCHEDULERS = {
    "lambda": functools.partial(LambdaLR, lr_lambda=lambda n: min(1.0, (n + 1) / 5)),
    "linear": functools.partial(LinearLR, start_factor=0.1, total_iters=4),
    "one cycle": functools.partial(OneCycleLR, max_lr=0.1, total_steps=20),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_torch_scheduler_goes_on_after_a_restore(kind):
    """A scheduler made for a restored optimizer does not set it back to its first values."""
    step = lk.with_schedule(SCHEDULERS[kind])(classifier)
    whole, state = make_state(), make_state()
    for i, batch in enumerate(make_batches(9)):
        step(whole, batch)
        if i == 4:
            saved = copy.deepcopy(state.state_dict())
            state = make_state(seed=3)
            state.load_state_dict(saved)
        step(state, batch)
    assert_bitwise_equal(state.model.state_dict(), whole.model.state_dict())
    assert state.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_averages_go_by_name_and_refuse_parameters_that_came_later():
    """Moving a parameter in its module changes nothing; adding one is an error, not a mixture."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, inputs):
            return self.a(inputs) - self.b(inputs)

    model = Two()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = lk.with_ema(0.0)(classifier)
    step(state, make_batches(1)[0])
    first = model.a
    del model.a
    model.a = first
    step(state, make_batches(1)[0])
    assert_bitwise_equal(state.features["ema"].weights["a.weight"], first.weight)
    model.later = nn.Linear(1, 1)
    with pytest.raises(lk.CompositionError, match="later"):
        step(state, make_batches(1)[0])


def test_complex_and_half_precision_parameters_are_averaged():
    """Complex parameters take part, and averages of bf16 weights are kept in float32."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.low = nn.Parameter(torch.full((2,), 100.0, dtype=torch.bfloat16))

    model = Mixed()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0))
    step = lk.with_ema(0.999)(lambda s, b: s.model.phase.abs().sum() + s.model.low.sum().float())
    for _ in range(3):
        step(state, None)
    weights = state.features["ema"].weights
    assert weights["low"].dtype == torch.float32
    assert (weights["low"] != 100).all()
    assert (weights["phase"] != 1).all()
    with lk.ema_weights(state):
        assert model.low.dtype == torch.bfloat16


def test_clipping_by_value_does_not_hide_an_infinite_gradient():
    """with_nonfinite looks before anything clips, in either order."""

    def infinite(state, batch):
        weight = state.model[0].weight
        return classifier(state, batch) + (weight - weight.detach()).sum() * math.inf

    decorators = [lk.with_nonfinite("skip"), lk.with_clip_value(0.1)]
    for order in (decorators, decorators[::-1]):
        state = make_state()
        assert not lk.compose(*order)(infinite)(state, make_batches(1)[0]).applied


def test_empty_and_sparse_gradients_can_be_looked_at():
    """with_nonfinite takes parameters without elements, and sparse gradients."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty, self.table = (
                nn.Parameter(torch.zeros(0, 3)),
                nn.Embedding(5, 2, sparse=True),
            )

    model = Odd()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = lk.with_nonfinite("skip")(lambda s, b: s.model.table(b).sum() + s.model.empty.sum())
    assert step(state, torch.tensor([1, 2])).applied


def test_raising_leaves_the_search_for_a_loss_scale_alone():
    """with_nonfinite("raise") and fp16: overflows lower the scale, a NaN loss raises."""
    state = make_state()
    step = lk.compose(lk.with_nonfinite("raise"), lk.with_amp("fp16", init_scale=2.0**24))
    applied = [bool(step(classifier)(state, batch).applied) for batch in make_batches(16)]
    assert not applied[0]
    assert applied[-1]
    with pytest.raises(lk.NonFiniteError):
        step(lambda s, b: classifier(s, b) * math.nan)(state, make_batches(1)[0])


def test_the_same_decorator_twice_is_refused():
    """One decorator object composed twice would act twice."""
    average = lk.with_ema(0.9)
    with pytest.raises(lk.CompositionError, match="'ema'"):
        average(average(classifier))


def test_groups_that_share_a_tensor_learning_rate_get_their_own():
    """A schedule for each group holds also where torch gave both groups one tensor."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    groups = [{"params": layer.parameters()} for layer in model]
    state = lk.TrainState(model, torch.optim.AdamW(groups, lr=torch.tensor(0.1)))
    step = lk.with_schedule(lr=[lambda n: 0.1, lambda n: 0.9])(classifier)
    step(state, make_batches(1)[0])
    assert [round(float(g["lr"]), 6) for g in state.optimizer.param_groups] == [0.1, 0.9]


def test_a_checkpoint_without_what_the_state_keeps_is_refused():
    """Averages, scales and counts are not left over beside weights from elsewhere."""
    state, plain = make_state(), make_state(seed=5)
    lk.with_ema(0.9)(classifier)(state, make_batches(1)[0])
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(lk.UsageError, match="ema"):
        state.load_state_dict(plain.state_dict())
    assert_bitwise_equal(state.model.state_dict(), before["model"])


def test_counts_and_fractional_weights_have_their_means():
    """A 0-d tensor of integers is averaged over a window, also with weights below one."""

    def function(state, batch):
        loss = classifier(state, batch)
        return {"loss": loss, "weight": 0.5, "correct": torch.tensor(len(batch[1]))}

    state = make_state()
    lk.with_grad_accum(2)(function)(state, lk.Window([make_batches(1, n)[0] for n in (2, 4)]))
    assert state.metrics["correct"] == 3.0


def test_an_empty_first_param_group_is_no_obstacle():
    """A split into groups may leave one without parameters."""
    model = nn.Linear(4, 3)
    groups = [{"params": []}, {"params": [*model.parameters()]}]
    state = lk.TrainState(model, torch.optim.AdamW(groups))
    step = lk.with_amp("bf16")(classifier)
    for _ in lk.run(step, state, make_batches(2), max_epochs=1):
        lk.evaluate(step, state, make_batches(1))
    assert state.step == 2


def test_a_step_that_keeps_nothing_may_not_follow_one_that_does():
    """Whether averages would be left behind does not depend on which step came first."""
    plain, averaged = lk.train_step(classifier), lk.with_ema(0.9)(classifier)
    state, batch = make_state(), make_batches(1)[0]
    plain(state, batch)
    averaged(state, batch)
    with pytest.raises(lk.CompositionError, match="ema"):
        plain(state, batch)


def test_set_up_that_fails_half_way_prepares_nothing_twice():
    """A second call goes on with the set-up where the first stopped."""
    prepared, failures = [], iter([True, False])

    def fail_once(state):
        if next(failures):
            message = "not yet"
            raise RuntimeError(message)

    step = lk.compose(
        lk.wrap(name="second", prepare=fail_once),
        lk.wrap(name="first", prepare=lambda state: prepared.append(1)),
    )(classifier)
    state, batch = make_state(), make_batches(1)[0]
    with pytest.raises(RuntimeError):
        step(state, batch)
    step(state, batch)
    assert prepared == [1]


def test_a_loss_of_another_model_is_an_error():
    """A loss that reaches none of the state's parameters trains nothing, and says so."""
    other, state = nn.Linear(4, 3), make_state()
    with pytest.raises(lk.OutputError, match="no gradient for any of the 4 parameters"):
        lk.train_step(lambda s, b: other(b[0]).sum())(state, make_batches(1)[0])
    assert state.step == 0


def test_training_in_eval_mode_is_warned_of():
    """A model that was left in eval mode is trained so, with a warning; parts of it may be."""
    state = make_state()
    state.model.eval()
    with pytest.warns(UserWarning, match="eval mode"):
        lk.train_step(classifier)(state, make_batches(1)[0])


def test_what_only_a_closure_can_step_is_told_at_once():
    """LBFGS without with_closure is an error that names it."""
    model = nn.Linear(4, 3)
    state = lk.TrainState(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(lk.CompositionError, match="with_closure"):
        lk.train_step(classifier)(state, make_batches(1)[0])


def test_a_state_can_be_deep_copied_after_an_update():
    """copy.deepcopy gives a snapshot."""
    state = make_state()
    lk.train_step(classifier)(state, make_batches(1)[0])
    branch = copy.deepcopy(state)
    assert branch.model is not state.model
    assert_bitwise_equal(branch.model.state_dict(), state.model.state_dict())


def test_a_factory_of_a_scheduler_that_needs_a_score_is_refused():
    """ReduceLROnPlateau is refused as a factory as well."""
    with pytest.raises(lk.UsageError, match="score"):
        lk.with_schedule(functools.partial(ReduceLROnPlateau))(classifier)(
            make_state(), make_batches(1)[0]
        )


def test_data_made_with_the_weights_is_made_after_the_update():
    """What a generator yields for the next update sees the weights of this one: on-policy."""
    for window, expected in ((None, [0, 1, 2, 3]), (2, [0, 0, 1, 1, 2, 2, 3])):
        state, made_at = make_state(), []

        def rollouts(state=state, made_at=made_at):
            while True:
                made_at.append(state.step)
                yield make_batches(1)[0]

        step = classifier if window is None else lk.with_grad_accum(window)(classifier)
        assert len([*lk.run(step, state, rollouts(), max_steps=3)]) == 3
        assert made_at == expected
