"""Steps and features as values."""

import functools
import pickle

import attrs
import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal

from problems import classifier, make_batches, make_state


@lk.with_ema(0.99)
@lk.with_clip(1.0)
@lk.with_amp("bf16")
def decorated(state, batch):
    return classifier(state, batch)


@attrs.frozen
class Noise:
    inner: lk.Transform
    strength: float

    def __call__(self, state):
        for gradient in state.gradients():
            gradient.add_(self.strength)
        return self.inner(state)


def settled(state):
    state.extras["prepared"] = state.extras.get("prepared", 0) + 1


class Tally:
    """State that a user's decorator keeps."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


@attrs.frozen
class CountUpdates:
    inner: lk.Transform

    def __call__(self, state):
        state.features["tally"].count += 1
        return self.inner(state)


with_tally = lk.wrap(init={"tally": lambda state: Tally()}, after=CountUpdates)


def test_a_step_prints_what_will_run_in_order():
    """print(step) names each feature at its place, in the order in which they run."""
    assert (
        str(decorated)
        == lk.explain(decorated)
        == """\
decorated: one call is one update
  init        with_ema(0.99)
  gradients   the gradients of the window, micro-batch by micro-batch
  forward     with_amp('bf16') > decorated
  transform   with_clip(1.0) > default
  apply       optimizer.step(), unless skipped
  after       with_ema(0.99) > default"""
    )
    assert repr(decorated) == "Step(decorated, with_amp('bf16'), with_clip(1.0), with_ema(0.99))"


def test_equal_decorators_on_one_function_give_equal_steps():
    """Steps compare by function and settings, and equal steps have equal hashes."""
    stack = lk.compose(lk.with_clip(1.0), lk.with_grad_accum({0: 1, 2: 4}))
    again = lk.compose(lk.with_clip(1.0), lk.with_grad_accum({0: 1, 2: 4}))
    assert stack(classifier) == again(classifier)
    assert hash(stack(classifier)) == hash(again(classifier))
    assert stack(classifier) != lk.with_clip(2.0)(lk.with_grad_accum(4)(classifier))
    noise = [lk.wrap(transform=functools.partial(Noise, strength=s)) for s in (0.1, 0.1, 0.2)]
    assert noise[0] == noise[1] != noise[2]


def test_a_decorated_function_of_a_module_pickles():
    """A step pickles although its decorated name now names the step and not the function."""
    assert pickle.loads(pickle.dumps(decorated)) == decorated
    more = lk.with_clip_value(0.5)(decorated)
    assert pickle.loads(pickle.dumps(more)) == more
    plain = lk.with_clip(1.0)(classifier)
    assert pickle.loads(pickle.dumps(plain)) == plain


def test_a_step_is_frozen():
    """A feature cannot be changed after it was composed."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        decorated.function = classifier


def test_compose_equals_the_stacked_decorators():
    """compose(a, b, c)(f) is a(b(c(f))), and lifting does no more."""
    a, b, c = lk.with_ema(0.9), lk.with_clip(1.0), lk.with_amp("bf16")
    assert lk.compose(a, b, c)(classifier) == a(b(c(classifier)))
    assert lk.compose(a, lk.compose(b, c))(classifier) == a(b(c(classifier)))
    assert lk.compose()(classifier) == lk.train_step(classifier) == lk.eval_step(classifier)


def test_a_step_returns_the_very_state_that_it_took():
    """One mutable handle: the state that comes back is the one that went in."""
    state = make_state()
    assert decorated(state, make_batches(1)[0]) is state
    assert state.step == 1


def test_prepare_runs_once_for_equal_features_of_several_steps():
    """What sets a state up is not run again for another step with the same feature."""
    with_settled = lk.wrap(name="settled", prepare=settled)
    state, batch = make_state(), make_batches(1)[0]
    with_settled(classifier)(state, batch)
    lk.with_clip(1.0)(with_settled(classifier))(state, batch)
    assert state.extras["prepared"] == 1


def test_set_up_runs_prepare_then_compile_then_parallelize_then_init():
    """The set-up places run in their order, whatever the order of the decorators."""
    order = []

    def note(name):
        return lambda state: order.append(name)

    step = lk.compose(
        lk.wrap(name="init", init={"tally": lambda state: order.append("init") or Tally()}),
        lk.own(name="parallel", parallelize=note("parallelize")),
        lk.own(name="compile", compile=note("compile")),
        lk.wrap(name="prepare", prepare=note("prepare")),
    )(classifier)
    step(make_state(), make_batches(1)[0])
    assert order == ["prepare", "compile", "parallelize", "init"]


def test_an_external_engine_can_own_backward_and_apply():
    """What owns backward and apply does the update, and ours stay out of its way."""

    class Engine:
        def backward(self, state, loss):
            loss.backward()

        def step(self, state, recompute):
            with torch.no_grad():
                for parameter in state.parameters_with_grad():
                    parameter.sub_(parameter.grad, alpha=0.05)
            return True

    engine = Engine()
    ours, theirs = make_state(optimizer="sgd"), make_state(optimizer="sgd")
    external = lk.own(name="engine", backward=engine.backward, apply=engine.step)
    for batch in make_batches():
        external(classifier)(ours, batch)
        lk.train_step(classifier)(theirs, batch)
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())


def test_a_users_state_is_saved_and_restored_with_the_rest():
    """State that a user's decorator keeps travels through state_dict."""
    state, resumed = make_state(), make_state()
    step = with_tally(classifier)
    for batch in make_batches(3):
        step(state, batch)
    resumed.load_state_dict(state.state_dict())
    assert resumed.pending == {"tally": {"count": 3}}
    step(resumed, make_batches(1)[0])
    assert resumed.features["tally"].count == 4
    assert resumed.pending == {}
