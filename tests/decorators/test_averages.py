"""Averages of the weights: exponential with warm-up, stochastic weight averaging, statistics."""

import copy

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, check_decorator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.optim.swa_utils import update_bn as torch_update_bn

from problems import classifier, make_batches, make_state


def quick(n):
    return n / (n + 3)


@pytest.mark.parametrize(
    "decorator",
    [
        lk.with_swa(3, every=2),
        lk.with_swa(1, name="mean"),
        lk.with_ema(0.9, warmup=10, name="other"),
        lk.with_ema(quick, every=2, buffers=True, name="other"),
    ],
    ids=repr,
)
def test_averages_keep_the_laws_of_decorators(decorator):
    """They compare, pickle, resume bit for bit, and give the same wherever they stand."""
    check_decorator(decorator)


@pytest.mark.parametrize("every", [1, 3])
def test_swa_is_torchs_averaged_model(every):
    """The mean along the end of training equals torch's, update by update."""
    state, theirs = make_state(), make_state()
    averaged, batches = None, make_batches(14)
    step = lk.with_swa(start=4, every=every)(classifier)
    for n, batch in enumerate(batches, 1):
        step(state, batch)
        lk.train_step(classifier)(theirs, batch)
        if n < 4:
            with pytest.raises(lk.UsageError, match="not begun"):
                lk.ema_weights(state, "swa")
        elif (n - 4) % every == 0:
            averaged = averaged or AveragedModel(theirs.model)
            averaged.update_parameters(theirs.model)
    assert averaged.n_averaged > 3
    for name, weight in averaged.module.named_parameters():
        torch.testing.assert_close(state.features["swa"].weights[name], weight.detach())
    with lk.ema_weights(state, "swa"):
        assert_bitwise_equal(dict(state.model.state_dict()), state.features["swa"].weights)
    assert_bitwise_equal(state.model.state_dict(), theirs.model.state_dict())


def test_swa_does_not_count_skipped_updates():
    """With every second update skipped, the mean is of the applied ones only."""
    state, by_hand = make_state(), []
    step = lk.compose(lk.with_swa(2, every=2), lk.with_nonfinite("skip"))(
        lambda s, b: classifier(s, b) * (torch.inf if s.step % 2 else 1)
    )
    for batch in make_batches(12):
        step(state, batch)
        if state.applied:
            by_hand.append(copy.deepcopy(state.model.state_dict()))
    assert len(by_hand) == 6
    for name, weight in state.features["swa"].weights.items():
        mean = torch.stack([by_hand[i][name] for i in (1, 3, 5)]).mean(0)
        torch.testing.assert_close(weight, mean)


def test_warmup_of_the_decay_is_the_formula():
    """The n-th average has the decay min(decay, (1 + n) / (10 + n)), from each second update."""
    state, average = make_state(), None
    step = lk.with_ema(0.6, warmup=10, every=2)(classifier)
    decays = []
    for n, batch in enumerate(make_batches(20), 1):
        average = average or copy.deepcopy(state.model.state_dict())
        step(state, batch)
        if n % 2 == 0:
            k = n // 2
            decays.append(min(0.6, (1 + k) / (10 + k)))
            for name, weight in state.model.state_dict().items():
                average[name] = average[name].lerp(weight, 1 - decays[-1])
    assert decays[0] == 2 / 11
    assert decays[-1] == 11 / 20
    assert_bitwise_equal(state.features["ema"].weights, dict(average))


def test_a_function_as_the_decay_gets_the_number_of_the_average():
    """with_ema(f) averages with f(1), f(2), ...; what is no fraction is an error."""
    seen = []

    def decay(n):
        seen.append(n)
        return 0.5

    state, plain = make_state(), make_state()
    for batch in make_batches(3):
        lk.with_ema(decay)(classifier)(state, batch)
        lk.with_ema(0.5)(classifier)(plain, batch)
    assert seen == [1, 2, 3]
    assert_bitwise_equal(state.features["ema"].weights, plain.features["ema"].weights)
    with pytest.raises(lk.UsageError, match="decay = 2"):
        lk.with_ema(lambda n: 2)(classifier)(make_state(), make_batches(1)[0])


def test_buffers_are_averaged_where_asked_for():
    """With buffers=True running statistics are averaged as torch does it, and swapped in."""
    state, theirs = make_state("conv"), make_state("conv")
    averaged = AveragedModel(theirs.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    averaged.update_parameters(theirs.model)  # torch begins with a copy, as we do
    step = lk.with_ema(0.8, buffers=True)(classifier)
    for batch in make_batches(6):
        step(state, batch)
        lk.train_step(classifier)(theirs, batch)
        averaged.update_parameters(theirs.model)
    own = copy.deepcopy(state.model.state_dict())
    for name in ("2.running_mean", "2.running_var", "1.weight"):
        wanted = averaged.module.state_dict()[name]
        torch.testing.assert_close(state.features["ema"].weights[name], wanted)
        assert not torch.equal(wanted, own[name])
    with lk.ema_weights(state):
        swapped = {name: value.clone() for name, value in state.model.state_dict().items()}
        assert_bitwise_equal(dict(state.state_dict()["model"]), dict(own))
    assert_bitwise_equal(swapped["2.running_mean"], state.features["ema"].weights["2.running_mean"])
    assert_bitwise_equal(dict(state.model.state_dict()), dict(own))


def swa_state():
    state = make_state("conv")
    step = lk.with_swa(3)(classifier)
    for batch in make_batches(7):
        step(state, batch)
    return state, step


def test_update_bn_equals_torchs():
    """The statistics for the averages are torch's, and the model keeps its own."""
    state, step = swa_state()
    theirs = copy.deepcopy(state.model)
    theirs.load_state_dict(state.features["swa"].weights, strict=False)
    batches = make_batches(5, seed=7)
    torch_update_bn(batches, theirs)
    before, rng = copy.deepcopy(state.model.state_dict()), torch.get_rng_state()
    norm = state.model[2]
    buffer = norm.running_mean
    lk.update_bn(step, state, batches)
    assert norm.running_mean is buffer
    assert norm.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), rng)
    assert_bitwise_equal(state.model.state_dict(), before)
    with lk.ema_weights(state, "swa"):
        assert_bitwise_equal(state.model.state_dict(), theirs.state_dict())
        assert_bitwise_equal(state.state_dict()["model"], before)
    assert_bitwise_equal(state.model.state_dict(), before)


def test_statistics_are_saved_with_their_averages_and_go_on():
    """What update_bn computed is in the checkpoint, before and after the next update."""
    state, step = swa_state()
    batches = make_batches(5, seed=7)
    lk.update_bn(step, state, batches)
    restored = make_state("conv", seed=5)
    restored.load_state_dict(state.state_dict())
    later = make_state("conv", seed=6)
    later.load_state_dict(state.state_dict())
    lk.update_bn(step, later, batches)  # on what was restored and not trained yet
    for other in (restored, later):
        with lk.ema_weights(state, "swa"), lk.ema_weights(other, "swa"):
            assert_bitwise_equal(other.model.state_dict(), state.model.state_dict())
    for one in (state, restored, later):
        step(one, batches[0])
    assert_bitwise_equal(restored.state_dict()["features"], state.state_dict()["features"])
    assert_bitwise_equal(later.state_dict()["features"], state.state_dict()["features"])


def test_a_frozen_batchnorm_keeps_its_own_statistics():
    """update_bn leaves norms in eval mode alone, and says so where none is left."""
    state, step = swa_state()
    state.model[2].eval()
    with pytest.raises(lk.UsageError, match="no BatchNorm in train mode"):
        lk.update_bn(step, state, make_batches(2))


WRONG = {
    "no start": (lambda: lk.with_swa(0), "start = 0"),
    "half an interval": (lambda: lk.with_swa(1, every=0.5), "every = 0.5"),
    "warm-up below one": (lambda: lk.with_ema(0.9, warmup=0), "warmup = 0"),
    "each zeroth": (lambda: lk.with_ema(0.9, every=0), "every = 0"),
    "statistics without averages": (
        lambda: lk.update_bn(classifier, make_state(), make_batches(1)),
        "keeps []",
    ),
    "two means under one name": (
        lambda: lk.compose(lk.with_swa(1), lk.with_swa(2))(classifier),
        "'swa'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Settings that cannot be right, and averages that are not there, are told."""
    wrong, found = WRONG[case]
    with pytest.raises(lk.LoopkitError) as caught:
        wrong()
    assert found in str(caught.value)


def test_empty_data_for_statistics_is_an_error():
    """update_bn over nothing says so, and leaves the averages as they were."""
    state, step = swa_state()
    with pytest.raises(lk.DataError, match="no batch"):
        lk.update_bn(step, state, [])
    assert state.features["swa"].statistics == {}
