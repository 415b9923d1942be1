"""Freezing parts of a model by a schedule."""

import copy

import loopkit as lk
import pytest
import torch
from loopkit.testing import Problem, assert_bitwise_equal, check_decorator
from torch import nn
from torch.nn import functional as F

from problems import classifier, make_batches, make_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.neck = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


def make_net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1))


PROBLEM = Problem(make_net, classifier, make_batches(5))


def test_thawing_equals_the_loop_by_hand():
    """Weights, statistics and optimizer equal a loop that freezes by hand, per epoch."""
    ours, theirs, batches = make_net(), make_net(), make_batches(4)
    step = lk.with_freeze({0: ["backbone", "neck"], 1: ["backbone"], 3: []})(classifier)
    [*lk.run(step, ours, batches, max_epochs=4)]
    model = theirs.model
    for epoch in range(4):
        for part, until in ((model.backbone, 3), (model.neck, 1)):
            part.requires_grad_(epoch >= until)
            part.train(epoch >= until)  # no dropout in it, so that this is its BatchNorm
        for inputs, labels in batches:
            theirs.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), labels).backward()
            theirs.optimizer.step()
    assert_bitwise_equal(ours.model.state_dict(), model.state_dict())
    assert_bitwise_equal(ours.optimizer.state_dict(), theirs.optimizer.state_dict())
    assert all(module.training for module in ours.model.modules())


def test_what_is_frozen_does_not_move_at_all():
    """No gradient, no weight decay, no optimizer state, no statistics; the rest trains."""
    state = make_net()
    before = copy.deepcopy(state.model.state_dict())
    step = lk.compose(lk.with_freeze("backbone"), lk.with_clip(1.0), lk.with_ema(0.9))(classifier)
    state.model.train()
    for batch in make_batches(4):
        state.model.train()  # as many a loop does; it must not wake the frozen BatchNorm
        step(state, batch)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name
    frozen = set(state.model.backbone.parameters())
    assert not frozen & state.optimizer.state.keys()
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert state.model.neck[1].training


def test_batchnorms_may_train_within_a_frozen_part():
    """train_bn=True leaves norms with running statistics out, parameters and statistics."""
    state = make_net()
    before = copy.deepcopy(state.model.state_dict())
    lk.with_freeze("backbone", train_bn=True)(classifier)(state, make_batches(1)[0])
    changed = {n for n, v in state.model.state_dict().items() if not torch.equal(v, before[n])}
    assert {"backbone.1.weight", "backbone.1.running_mean"} <= changed
    assert "backbone.0.weight" not in changed


def test_what_the_user_froze_stays_frozen():
    """Thawing wakes only what the schedule froze: not a parameter or norm frozen by its owner."""
    state = make_net()
    state.model.backbone[0].bias.requires_grad_(False)
    state.model.backbone[1].eval()
    step = lk.with_freeze(lambda s: ["backbone"] if s.step < 2 else [])(classifier)
    for batch in make_batches(4):
        step(state, batch)
    assert state.model.backbone[0].weight.requires_grad
    assert not state.model.backbone[0].bias.requires_grad
    assert not state.model.backbone[1].training


@pytest.mark.parametrize("patterns", ["backbone.0.*", ["neck", "*.bias"], "backbone.[01]"])
def test_patterns_are_of_modules_and_parameters(patterns):
    """Module names, parameter names and shell patterns freeze what they fit, and only that."""
    state = make_net()
    before = copy.deepcopy(dict(state.model.named_parameters()))
    lk.with_freeze(patterns)(classifier)(state, make_batches(1)[0])
    fits = {
        "backbone.0.*": {"backbone.0.weight", "backbone.0.bias"},
        "backbone.[01]": {f"backbone.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")},
    }.get(str(patterns)) or {n for n in before if n.startswith("neck") or n.endswith("bias")}
    same = {n for n, p in state.model.named_parameters() if torch.equal(p, before[n])}
    assert same == fits
    assert state.model.backbone[1].training == (patterns != "backbone.[01]")
    assert state.model.neck[1].training == (patterns != ["neck", "*.bias"])


@pytest.mark.parametrize(
    "decorator",
    [lk.with_freeze("backbone"), lk.with_freeze({0: "backbone.0", 1: []}, train_bn=True)],
    ids=repr,
)
def test_freezing_keeps_the_laws(decorator):
    """It compares, pickles, resumes bit for bit across a thaw, and stands anywhere."""
    check_decorator(decorator, PROBLEM)


def test_a_resumed_and_a_branched_training_thaw_alike():
    """Stopped while frozen, and resumed or branched, it thaws as if nothing had been."""
    step = lk.with_freeze({0: "backbone", 2: []})(classifier)
    state, batches = make_net(), make_batches(3)
    [*lk.run(step, state, batches, max_epochs=1)]
    resumed, branch = make_net(seed=7), state.snapshot()
    resumed.load_state_dict(state.state_dict())
    for one in (state, resumed, branch):
        [*lk.run(step, one, batches, max_epochs=4)]
    assert_bitwise_equal(resumed.state_dict(), state.state_dict())
    assert_bitwise_equal(branch.model.state_dict(), state.model.state_dict())
    back = make_net()
    early = copy.deepcopy(back.state_dict())
    [*lk.run(step, back, batches, max_epochs=3)]
    assert back.model.backbone[0].weight.requires_grad
    back.load_state_dict({**early, "features": {"frozen": {}}})
    step(back, batches[0])
    assert not back.model.backbone[0].weight.requires_grad


def first(schedule):
    lk.with_freeze(schedule)(classifier)(make_net(), PROBLEM.batches[0])


WRONG = {
    "a part that is not there": (lambda: first("backbon"), "'backbone"),
    "a part of a later epoch": (lambda: first({0: [], 9: "hed"}), "'head'"),
    "a part that a function names": (lambda: first(lambda s: "no"), "no parameter"),
    "a number": (lambda: lk.with_freeze(3), "int"),
    "numbers": (lambda: lk.with_freeze([3]), "list"),
    "half an epoch": (lambda: lk.with_freeze({0.5: "head"}), "epoch 0.5"),
    "a function of numbers": (lambda: first(lambda s: 3), "3 (int)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_schedule_is_an_error_that_teaches(case):
    """What names nothing, or is no schedule, is told with what would be right."""
    wrong, found = WRONG[case]
    with pytest.raises(lk.UsageError) as caught:
        wrong()
    assert found in str(caught.value)


def test_it_is_told_before_the_first_update():
    """A part that is only frozen later is looked for when the run starts."""
    with pytest.raises(lk.UsageError, match="no parameter of Sequential"):
        lk.run(lk.with_freeze({5: "backbone"})(classifier), make_state(), make_batches(1))
