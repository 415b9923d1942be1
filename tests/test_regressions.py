"""Faults that reviews have found: each was wrong once, and stays mended."""

import copy
import functools
import math
import warnings

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.norms import total_norm
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


ARRAYS = {
    "floats": np.array([1.5, -0.0, math.nan], np.float32), "empty": np.zeros((0, 3), np.uint16),
    "big-endian": np.arange(4, dtype=">i2"), "complex": np.array([[1 + 2j]]),
    "0-d": np.array(5), "scalar": np.float32(0.1), "number": np.float64(0.1),
    "flags": [np.bool_(True), {"mask": np.array([True, False])}],
}  # fmt: skip


def test_numpy_extras_are_saved_and_restored_as_what_they_were(tmp_path):
    """Arrays come back as writable arrays, scalars as scalars, of the same dtype and bits."""
    state, fresh = make_state(), make_state()
    state.extras |= ARRAYS
    fresh.extras["floats"] = np.ones(3, np.float32)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert checkpoints.restore(fresh)
    native = {**ARRAYS, "big-endian": np.arange(4, dtype=np.int16)}
    assert_bitwise_equal(fresh.extras, native)
    for name, value in native.items():
        assert type(fresh.extras[name]) is type(value)
        assert getattr(fresh.extras[name], "dtype", None) == getattr(value, "dtype", None)
    fresh.extras["floats"][0] = 7


def test_what_a_state_dict_gave_is_no_longer_the_state_of_arrays():
    """An array that is changed in place after it was loaded changes nothing elsewhere."""
    first, second = make_state(), make_state()
    first.extras["seen"] = np.zeros(2)
    second.load_state_dict(first.state_dict())
    second.extras["seen"] += 1
    assert_bitwise_equal(first.extras["seen"], np.zeros(2))


def test_extras_that_cannot_be_saved_are_told_of_once(tmp_path):
    """A save names them, and their types, where it was called; the next one does not again."""
    state = make_state()
    state.extras |= {"tokenize": str.split, "kept": 3, "words": np.array(["a"])}
    with lk.Checkpointer(tmp_path) as checkpoints:
        with pytest.warns(lk.CheckpointWarning, match=r"tokenize \(method_d.*words \(nda") as told:
            assert checkpoints.save(state)
        assert [w.filename for w in told] == [__file__]
        assert checkpoints.save(state)
        restored = make_state()
        restored.extras["tokenize"] = str.lower
        assert checkpoints.restore(restored)
    assert restored.extras == {"tokenize": str.lower, "kept": 3}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (np.array([0.0, 1.0]), np.array([-0.0, 1.0]), "differs in 1 of 2"),
        (np.ones(2), np.ones(2, np.float32), r"float64\[2\], not float32\[2\]"),
        (np.ones(2), np.ones((2, 1)), r"\[2\], not float64\[2, 1\]"),
        (np.ones(2), torch.ones(2), "ndarray, not a Tensor"),
        ([1.0, 1.0], np.ones(2), "list, not a ndarray"),
        (np.array(["a", None]), np.array(["a", "b"], object), "is None, not 'b'"),
    ],
)
def test_arrays_are_compared_bit_for_bit(ours, theirs, message):
    """Arrays that differ in a bit, a dtype, a shape or a type are not equal; others are."""
    with pytest.raises(AssertionError, match=message):
        assert_bitwise_equal({"a": ours}, {"a": theirs})
    assert_bitwise_equal({"a": copy.deepcopy(ours)}, {"a": ours})


def test_an_extra_gets_copies_of_what_another_state_gave():
    """What an extra's own load_state_dict keeps is not the other state's."""

    class Seen:
        def __init__(self):
            self.found = [torch.zeros(1)]

        def state_dict(self):
            return {"found": self.found}

        def load_state_dict(self, state_dict):
            self.found = state_dict["found"]

    first, second = make_state(), make_state()
    first.extras["seen"], second.extras["seen"] = Seen(), Seen()
    second.load_state_dict(first.state_dict())
    second.extras["seen"].found[0] += 1
    second.extras["seen"].found.append(3)
    assert_bitwise_equal(first.extras["seen"].found, [torch.zeros(1)])


def test_a_branch_with_a_new_torch_scheduler_trains_without_a_warning():
    """A copy steps its own optimizer, in torch's eyes too, and with the same numbers."""
    state = make_state()
    scheduler = LinearLR(state.optimizer, start_factor=0.1, total_iters=4)
    step = lk.with_schedule(lambda optimizer: scheduler)(classifier)
    step.set_up(state)
    branch = state.snapshot()
    assert branch.optimizer.param_groups[0]["lr"] == state.optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in make_batches(3):
            step(branch, batch)
            assert branch.step > state.step
    for batch in make_batches(3):
        step(state, batch)
    assert_bitwise_equal(branch.model.state_dict(), state.model.state_dict())
    assert branch.optimizer.param_groups[0]["lr"] == state.optimizer.param_groups[0]["lr"]


def test_the_norm_of_no_gradients_is_zero():
    """As torch's: what clips shards asks for it after an update over nothing."""
    assert total_norm([]) == nn.utils.get_total_norm([]) == 0
