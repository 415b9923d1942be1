"""Several optimizers as one: bit for bit what stepping them by hand gives."""

import copy
import functools
import io
import pickle

import loopkit as lk
import pytest
import torch
from loopkit import CompositionError, UsageError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Muon, lr_scheduler


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 9)
    )


RULES = {
    "4.weight": {"lr": 0.005},
    "matrix": {"optimizer": "muon", "lr": 0.02, "momentum": 0.9},
    ("bias", "norm"): {"weight_decay": 0.0},
}


def by_rules(model):
    return lk.create_optimizer(
        lk.param_groups(model, RULES), "adamw", lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)
    )


def by_hand(model):
    """The optimizers that a careful person would write."""
    embedding, hidden, norm, head = model[0], model[1], model[2], model[4]
    vectors = [hidden.bias, norm.weight, norm.bias, head.bias]
    return (
        AdamW(
            [
                {"params": [head.weight], "lr": 0.005},
                {"params": vectors, "weight_decay": 0.0},
                {"params": [embedding.weight]},
            ],
            lr=0.01,
            weight_decay=0.1,
            betas=(0.9, 0.95),
        ),
        Muon([hidden.weight], lr=0.02, weight_decay=0.1, momentum=0.9),
    )


def loss_of(state, tokens):
    return F.cross_entropy(state.model(tokens), (tokens + 1) % 9)


def batches(count=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, (8,), generator=generator) for _ in range(count)]


def same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def make_state():
    model = mlp()
    return lk.TrainState(model, by_rules(model))


def test_rules_route_to_optimizers_as_by_hand():
    """Twenty updates through the rules end at the weights of two optimizers stepped by hand."""
    state, model = make_state(), mlp()
    optimizers = by_hand(model)
    step = lk.train_step(loss_of)
    for tokens in batches():
        step(state, tokens)
        model.zero_grad()
        F.cross_entropy(model(tokens), (tokens + 1) % 9).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same(state.model, model)


def test_groups_come_in_the_order_of_the_rules():
    """The order that `with_schedule(lr=[...])` is zipped with; each group says whose it is."""
    groups = make_state().optimizer.param_groups
    assert [(g["name"], g["optimizer"], g["lr"]) for g in groups] == [
        ("4.weight", "adamw", 0.005),
        ("matrix", "muon", 0.02),
        ("bias, norm", "adamw", 0.01),
        ("rest", "adamw", 0.01),
    ]


def test_schedules_reach_every_member():
    """A value set in the combined groups is the value that the member steps with."""
    lr = lk.warmup(5, peak=1.0) >> lk.cosine(15)
    schedules = [lr * 0.005, lr * 0.02, lr * 0.01, lr * 0.01]
    state, model = make_state(), mlp()
    adamw, muon = by_hand(model)
    step = lk.with_schedule(lr=schedules)(loss_of)
    for n, tokens in enumerate(batches()):
        step(state, tokens)
        values = [schedule(n) for schedule in schedules]
        groups = [adamw.param_groups[0], muon.param_groups[0], *adamw.param_groups[1:]]
        for group, value in zip(groups, values, strict=True):
            group["lr"] = value
        model.zero_grad()
        F.cross_entropy(model(tokens), (tokens + 1) % 9).backward()
        adamw.step(), muon.step()
    assert same(state.model, model)


def test_a_torch_scheduler_works_on_it():
    """A torch scheduler sees one optimizer and scales every group."""
    state = make_state()
    halve = functools.partial(lr_scheduler.ExponentialLR, gamma=0.5)
    lk.with_schedule(halve)(loss_of)(state, batches(1)[0])
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.0025, 0.01, 0.005, 0.005]
    assert state.optimizer.optimizers["muon"].param_groups[0]["lr"] == 0.01


def through_file(values):
    """Saved and loaded, without running code."""
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("resumed", [0, 1, 7])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(resumed):
    """Saved after any update, loaded in fresh objects, gone on with: the same weights."""
    step = lk.with_schedule(lr=lk.warmup(5, peak=0.02) >> lk.cosine(15))(loss_of)
    whole, first, second = make_state(), make_state(), make_state()
    for tokens in batches():
        step(whole, tokens)
    for tokens in batches()[:resumed]:
        step(first, tokens)
    second.load_state_dict(through_file(first.state_dict()))
    for tokens in batches()[resumed:]:
        step(second, tokens)
    assert same(whole.model, second.model)


def test_the_state_dict_has_torchs_format():
    """Parameters are numbered through the groups; each has the state of its own optimizer."""
    state = make_state()
    lk.train_step(loss_of)(state, batches(1)[0])
    saved = state.optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1], [2, 3, 4, 5], [6]]
    assert set(saved["state"][1]) == {"momentum_buffer"}
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_torchs_distributed_checkpoints_take_it():
    """Saved by parameter name through torch.distributed.checkpoint, nested and flat, and back."""
    state = make_state()
    lk.train_step(loss_of)(state, batches(1)[0])
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(state.model, state.optimizer, options=options)
        other = make_state()
        set_optimizer_state_dict(other.model, other.optimizer, saved, options=options)
        for a, b in zip(state.parameters(), other.parameters(), strict=True):
            mine, theirs = state.optimizer.state[a], other.optimizer.state[b]
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    "again",
    [
        lambda s: s.snapshot(),
        lambda s: lk.TrainState(*copy.deepcopy((s.model, s.optimizer))),
        lambda s: lk.TrainState(*pickle.loads(pickle.dumps((s.model, s.optimizer)))),
    ],
    ids=["snapshot", "deepcopy", "pickle"],
)
def test_copies_are_whole_and_independent(again):
    """A copy trains on as the original does, and neither moves the other."""
    step = lk.train_step(loss_of)
    state = make_state()
    step(state, batches()[0])
    copied = again(state)
    step(copied, batches()[1])
    assert not same(state.model, copied.model)
    step(state, batches()[1])
    assert same(state.model, copied.model)
    member = copied.optimizer.optimizers["muon"]
    assert member.param_groups[0] is copied.optimizer.param_groups[1]
    assert member.state is copied.optimizer.state


def test_accumulation_clipping_and_skipping_compose_with_it():
    """The features see one optimizer: a non-finite update leaves every member as it was."""
    state = make_state()
    step = lk.compose(lk.with_nonfinite("skip"), lk.with_clip(1.0), lk.with_grad_accum(2))(scaled)
    step(state, lk.Window([(batches()[0], 1.0), (batches()[1], 1.0)]))
    before = state.snapshot()
    step(state, lk.Window([(batches()[2], 1.0), (batches()[3], float("nan"))]))
    assert not state.applied
    assert same(before.model, state.model)
    for old, new in zip(before.parameters(), state.parameters(), strict=True):
        olds, news = before.optimizer.state[old], state.optimizer.state[new]
        assert all(torch.equal(olds[key], news[key]) for key in olds)


def scaled(state, batch):
    return batch[1] * loss_of(state, batch[0])


def test_the_closure_runs_once():
    """A closure is evaluated once, with gradients, and its loss returned."""
    model, calls = mlp(), []
    optimizer = by_rules(model)

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = model(torch.arange(9)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [True]


def test_zero_grad_clears_every_member():
    """`zero_grad` is torch's, over all groups."""
    model = mlp()
    optimizer = by_rules(model)
    model(torch.arange(9)).sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_groups_can_be_added_to_a_member():
    """Unfrozen parameters join the optimizer that their group names."""
    model, late = mlp(), nn.Linear(3, 3)
    optimizer = by_rules(model)
    optimizer.add_param_group({"params": [late.weight], "optimizer": "muon", "lr": 0.5})
    assert optimizer.param_groups[-1] is optimizer.optimizers["muon"].param_groups[-1]
    late(torch.ones(1, 3)).sum().backward()
    before = late.weight.clone()
    optimizer.step()
    assert not torch.equal(before, late.weight)


def test_optimizers_of_your_own_combine():
    """Made by hand, with what they have seen already, they go on as one."""
    model, other = mlp(), mlp()
    for m in (model, other):
        m(torch.arange(9)).sum().backward()
    first, second = by_hand(model), by_hand(other)
    for optimizer in (*first, *second):
        optimizer.step()
    combined = lk.CombinedOptimizer({"a": first[0], "b": first[1]})
    combined.step()
    for optimizer in second:
        optimizer.step()
    assert same(model, other)


def test_settings_are_for_the_named_optimizer_and_weight_decay_for_all():
    """`betas` would mean nothing to Muon; its weight decay is the one that was given."""
    optimizer = by_rules(mlp())
    muon = optimizer.optimizers["muon"].param_groups[0]
    assert "betas" not in muon
    assert muon["weight_decay"] == 0.1


def test_rules_for_one_optimizer_make_that_one():
    """Nothing is combined where there is nothing to combine."""
    groups = lk.param_groups(mlp(), {"*": {"optimizer": "sgd"}})
    assert type(lk.create_optimizer(groups, "sgd", lr=0.1)) is SGD


def test_two_optimizers_for_one_parameter_are_an_error():
    """The shape and both names are in the message."""
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(CompositionError, match=r"\[2, 3\] in both 'a' and 'b'"):
        lk.CombinedOptimizer({"a": SGD([weight]), "b": SGD([weight])})


def test_no_optimizers_are_an_error():
    """Nothing cannot be combined."""
    with pytest.raises(UsageError, match="no optimizers"):
        lk.CombinedOptimizer({})


def test_a_group_of_no_member_is_an_error():
    """The members are named, with the one that is near."""
    optimizer = by_rules(mlp())
    with pytest.raises(UsageError, match="'muon'; known"):
        optimizer.add_param_group({"params": [torch.zeros(1)], "optimizer": "moun"})


def test_the_state_of_other_optimizers_is_an_error():
    """A state saved by a plain AdamW, or routed otherwise, is not loaded into the wrong member."""
    model = mlp()
    saved = AdamW(lk.param_groups(model, {**RULES, "matrix": {}})).state_dict()
    with pytest.raises(UsageError, match=r"adamw.*muon"):
        by_rules(model).load_state_dict(saved)
