"""The optimizer's step within the backward pass."""

import functools
import pickle

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn

from problems import classifier, halving, make_batches, make_state, mlp, weighted_classifier

MADE = {
    name: functools.partial(getattr(torch.optim, name), lr=0.01)
    for name in (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam"),
        *("RAdam", "RMSprop", "Rprop", "SGD"),
    )
} | {
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
    "fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "capturable": functools.partial(torch.optim.AdamW, lr=torch.tensor(0.01)),
}


def state_with(make, model="dropout"):
    torch.manual_seed(0)
    state = make_state(model)
    parameters = enumerate(state.model.parameters())
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in parameters]
    return lk.TrainState(state.model, make(groups))


def trained(decorators, state, function=classifier):
    torch.manual_seed(3)
    losses = [
        float(s.loss)
        for s in lk.run(lk.compose(*decorators)(function), state, make_batches(5), max_epochs=2)
    ]
    return state, losses


@pytest.mark.parametrize("name", MADE)
def test_any_torch_optimizer_gives_the_same_bits(name):
    """Weights, losses and state_dict of each optimizer equal those of the plain step."""
    others = [lk.with_schedule(lr=halving), lk.with_ema(0.9), lk.with_amp("bf16")]
    ours, losses = trained([lk.with_optimizer_in_backward(), *others], state_with(MADE[name]))
    theirs, wanted = trained(others, state_with(MADE[name]))
    assert losses == wanted
    assert_bitwise_equal(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("model", ["tied", "conv"])
def test_tied_weights_and_convolutions_update_once(model):
    """A weight that is used twice is stepped once, with its whole gradient."""
    ours, _ = trained([lk.with_optimizer_in_backward()], state_with(MADE["AdamW"], model))
    theirs, _ = trained([lk.wrap(name="nothing")], state_with(MADE["AdamW"], model))
    assert_bitwise_equal(ours.state_dict(), theirs.state_dict())


def test_several_optimizers_as_one_work_too():
    """Muon for matrices and AdamW for the rest: the same bits as their plain step."""
    states = []
    for decorator in (lk.with_optimizer_in_backward(), lk.wrap(name="nothing")):
        torch.manual_seed(0)
        model = mlp()
        optimizer = lk.configure_optimizer(model, "muon", lr=0.01, weight_decay=0.1)
        states.append(trained([decorator], lk.TrainState(model, optimizer))[0])
    assert_bitwise_equal(states[0].state_dict(), states[1].state_dict())


def test_gradients_do_not_exist_together():
    """At no time within the backward pass is there more than one parameter's gradient."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    most = {}
    for name, step in {
        "in backward": lk.with_optimizer_in_backward()(lambda s, x: s.model(x).sum()),
        "plain": lk.train_step(lambda s, x: s.model(x).sum()),
    }.items():
        alive = []

        def look(parameter, alive=alive):
            alive.append(sum(p.grad is not None for p in model.parameters()))

        hooks = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
        step(state, torch.ones(2, 8))
        for hook in hooks:
            hook.remove()
        most[name] = max(alive)
        assert len(alive) == 6
    assert most == {"in backward": 1, "plain": 6}


def test_no_hook_stays_and_errors_leave_the_optimizer_whole():
    """After an update, and after one that failed, parameters and groups are as before."""
    state = state_with(MADE["AdamW"])
    step = lk.with_optimizer_in_backward()
    groups = state.optimizer.param_groups
    step(classifier)(state, make_batches(1)[0])

    def failing(state, batch):
        loss = classifier(state, batch)
        state.model[0].weight.register_hook(lambda g: 1 / 0)
        return loss

    with pytest.raises(ZeroDivisionError):
        step(failing)(state, make_batches(1)[0])
    assert state.optimizer.param_groups is groups
    assert [len(group["params"]) for group in groups] == [1] * 4
    assert not any(p._post_accumulate_grad_hooks for p in state.model.parameters())


def test_frozen_parameters_and_updates_over_nothing_are_left_alone():
    """With with_freeze a part stays; an update over no labels is not applied."""
    state = state_with(MADE["AdamW"])
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    step = lk.compose(lk.with_optimizer_in_backward(), lk.with_freeze("0"))(weighted_classifier)
    inputs, labels = make_batches(1)[0]
    step(state, (inputs, torch.full_like(labels, -100)))
    assert not state.applied
    assert_bitwise_equal(state.model.state_dict(), before)
    step(state, (inputs, labels))
    assert state.applied
    assert torch.equal(state.model[0].weight, before["0.weight"])
    assert not torch.equal(state.model[3].weight, before["3.weight"])


def test_it_keeps_the_laws():
    """It compares, pickles and resumes bit for bit."""
    # check_decorator clips, which this excludes: so its laws, apart from the orders
    step = lk.with_optimizer_in_backward()(classifier)
    assert pickle.loads(pickle.dumps(step)) == step
    whole, part = state_with(MADE["NAdam"]), state_with(MADE["NAdam"])
    batches = make_batches(4)
    for state, stop in ((whole, None), (part, 3)):
        torch.manual_seed(4)
        [*lk.run(step, state, batches, max_epochs=2, max_steps=stop)]
        saved = state.state_dict()
    again = state_with(MADE["NAdam"])
    again.load_state_dict(saved)
    [*lk.run(step, again, batches, max_epochs=2)]
    assert_bitwise_equal(again.model.state_dict(), whole.model.state_dict())
    assert_bitwise_equal(again.optimizer.state_dict(), whole.optimizer.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        lk.with_clip(1.0), lk.with_grad_accum(2), lk.with_amp("fp16"), lk.with_nonfinite("skip"),
        lk.with_sam(0.1), lk.with_closure(), lk.with_microbatch(2), lk.with_grad_noise(0.1),
    ],
    ids=repr,
)  # fmt: skip
def test_what_needs_all_gradients_is_refused(other):
    """Composing it with what reads gradients, in either order, is an error at once."""
    for pair in (
        (lk.with_optimizer_in_backward(), other),
        (other, lk.with_optimizer_in_backward()),
    ):
        with pytest.raises(lk.CompositionError, match="with_optimizer_in_backward"):
            lk.compose(*pair)(classifier)


@pytest.mark.parametrize("turn", [1, -1])
def test_beside_distributed_one_process_trains_as_ever(turn):
    """Only several ranks are refused: alone `distributed` does nothing, and the bits are equal."""
    pair = [lk.with_optimizer_in_backward(), lk.distributed("fsdp")]
    ours, _ = trained(pair[::turn], state_with(MADE["AdamW"]))
    plain, _ = trained([], state_with(MADE["AdamW"]))
    assert_bitwise_equal(ours.model.state_dict(), plain.model.state_dict())


def test_optimizers_whose_parameters_depend_on_each_other_are_refused():
    """LBFGS, and optimizers that count in their groups, are told with what to use."""
    pytest.importorskip("schedulefree")
    lbfgs = state_with(lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]))
    free = make_state()
    schedule_free = lk.create_optimizer(free.model.parameters(), "schedule_free_sgd", lr=0.1)
    for state in (lbfgs, lk.TrainState(free.model, schedule_free)):
        with pytest.raises(lk.CompositionError, match="parameters are independent"):
            lk.with_optimizer_in_backward()(classifier)(state, make_batches(1)[0])


def test_a_loss_that_reaches_no_parameter_is_an_error():
    """A loss of another copy of the model is told, as in a plain step."""
    state, other = make_state(), make_state()
    step = lk.with_optimizer_in_backward()(lambda s, b: classifier(other, b))
    with pytest.raises(lk.OutputError, match="no gradient for any of the 4 parameters"):
        step(state, make_batches(1)[0])
