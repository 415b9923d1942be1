"""The places that are made of others, and what excludes what."""

import attrs
import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal

from problems import classifier, make_batches, make_state


@attrs.frozen
class OneByOne:
    """Owns `gradients` as a pipeline schedule would: it drives the parts itself."""

    parts: object

    def __call__(self, state, window):
        micro_batches, count = window
        outcome = state.begin_update(count)
        for i, batch in enumerate(micro_batches, 1):
            with self.parts.around(state, i == count):
                loss = self.parts.forward(state, batch)
                self.parts.backward(state, loss / count)
            outcome.parts.append((loss.detach(), None, {}))


@attrs.frozen
class Whole:
    """Owns `update`, and runs its parts as the default does."""

    parts: object

    def __call__(self, state, window):
        state.extras["updates"] = state.extras.get("updates", 0) + 1
        self.parts.gradients(state, window)
        self.parts.unscale(state)
        self.parts.transform(state)
        state.verdict = self.parts.verdict(state)
        return self.parts.apply(state, self.parts.recompute)


@attrs.frozen
class Twice:
    """A layer of `gradients` that computes them twice, as sharpness-aware minimisation does."""

    inner: object

    def __call__(self, state, window):
        self.inner(state, window)
        self.inner(state, window)


def trained(decorator, **settings):
    step = lk.compose(decorator, lk.with_clip(0.5), lk.with_amp("bf16"), lk.with_grad_accum(2))(
        classifier
    )
    state = make_state()
    [*lk.run(step, state, make_batches(5), max_epochs=2)]
    return state


@pytest.mark.parametrize("owner", [{"gradients": OneByOne}, {"update": Whole}], ids=str)
def test_an_owner_of_a_composite_place_is_made_from_its_parts(owner):
    """Driving the parts itself, with the layers of other features in them, changes no bit."""
    state, plain = trained(lk.own(**owner)), trained(lk.wrap(name="nothing"))
    assert_bitwise_equal(state.model.state_dict(), plain.model.state_dict())
    assert state.extras.get("updates", 6) == 6


def test_what_reads_a_window_twice_can_have_it_kept():
    """With KeepMicroBatches a lazy window is read again, and the gradients are the same."""
    state, plain = make_state(), make_state()
    step = lk.compose(lk.wrap(gradients=Twice, split=lk.KeepMicroBatches), lk.with_grad_accum(2))(
        classifier
    )
    batches = make_batches(4)
    step(state, lk.Window(iter(batches), 4))
    lk.with_grad_accum(4)(classifier)(plain, lk.Window(batches))
    assert_bitwise_equal(state.model.state_dict(), plain.model.state_dict())


def test_a_feature_can_exclude_others_from_a_place():
    """What leaves no gradients for a place is refused beside what works there, in any order."""
    greedy = lk.own(name="greedy", apply=lambda state, recompute: True, excludes=("transform",))
    for decorators in ((greedy, lk.with_clip(1.0)), (lk.with_clip(1.0), greedy)):
        with pytest.raises(lk.CompositionError, match="greedy composed with with_clip"):
            lk.compose(*decorators)(classifier)
    lk.compose(greedy, lk.with_amp("bf16"))(classifier)


def test_run_sets_the_state_up_before_its_first_update():
    """What the set-up finds wrong is raised where run is called, before any batch is read."""
    step = lk.with_schedule(rate=lambda n: 0.1)(classifier)
    with pytest.raises(lk.UsageError, match="rate"):
        lk.run(step, make_state(), make_batches(2))


def test_a_step_can_be_set_up_by_hand():
    """After set_up a state keeps what the features keep, and the first update changes nothing."""
    step = lk.with_ema(0.9)(classifier)
    state = step.set_up(make_state())
    assert "ema" in state.features
    assert state.step == 0
    before = state.features["ema"]
    step(state, make_batches(1)[0])
    assert state.features["ema"] is before


def test_a_step_without_gradients_is_told_after_its_update():
    """A loss that reaches no parameter of the state is an error, and the weights are as before."""
    state, other = make_state(), make_state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(lk.OutputError, match="no gradient"):
        lk.train_step(lambda state, batch: classifier(other, batch))(state, make_batches(1)[0])
    assert_bitwise_equal(before, state.model.state_dict())
    assert torch.is_grad_enabled()
