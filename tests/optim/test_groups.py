"""Which parameters a rule is for."""

import loopkit as lk
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from loopkit import UsageError
from loopkit.optim.groups import named_parameters
from torch import nn


class T5RMSNorm(nn.Module):
    """A norm of another library: only its name says so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.LayerNorm(3).weight.detach().clone())


class NormedLinear(nn.Linear):
    """No norm, for all its name."""


class Model(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.bag = nn.EmbeddingBag(5, 3)
        self.batch, self.own = nn.BatchNorm2d(3), T5RMSNorm()
        self.area = nn.LayerNorm((2, 2))
        self.conv, self.line = nn.Conv2d(3, 3, 1), NormedLinear(3, 3)
        self.lstm = nn.LSTM(3, 3)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.words.weight


KINDS = {
    "words.weight": "embedding",
    "bag.weight": "embedding",
    "batch.weight": "norm",
    "batch.bias": "norm",
    "own.weight": "norm",
    "area.weight": "norm",
    "area.bias": "norm",
    "conv.weight": "kernel",
    "conv.bias": "bias",
    "line.weight": "matrix",
    "line.bias": "bias",
    "lstm.weight_ih_l0": "matrix",
    "lstm.weight_hh_l0": "matrix",
    "lstm.bias_ih_l0": "bias",
    "lstm.bias_hh_l0": "bias",
    "out.bias": "bias",
}


def test_each_parameter_has_one_kind():
    """By its module where that is an embedding or a norm, else by its dimensions."""
    found = {named.names[0]: named.kind for named in named_parameters(Model())}
    assert found == KINDS


def test_a_tied_parameter_is_there_once_with_all_its_names():
    """It can be routed by any of them."""
    model = Model()
    assert next(n for n in named_parameters(model)).names == ("words.weight", "out.weight")
    by_head, _ = lk.param_groups(model, {"out.weight": {"lr": 1.0}})
    assert by_head["params"][0] is model.words.weight


patterns = st.sampled_from(
    ["bias", "embedding", "kernel", "matrix", "norm", "*", "*.bias", "l*", "lstm.*", "conv.?eight"]
)


@given(st.lists(patterns, unique=True, max_size=4))
def test_every_parameter_is_in_one_group_whatever_the_rules(rules):
    """Rules split the parameters: none is lost, none is there twice, the first rule wins."""
    model = Model()
    every = named_parameters(model)
    won = [next((i for i, rule in enumerate(rules) if n.fits(rule)), None) for n in every]
    assume({*range(len(rules))} <= {*won})  # a rule that wins nothing is an error
    groups = lk.param_groups(model, {rule: {"lr": i} for i, rule in enumerate(rules)})
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    for named, first in zip(every, won, strict=True):
        group = next(g for g in groups if any(p is named.parameter for p in g["params"]))
        assert group.get("lr") == first


WRONG = {
    "a pattern of nothing": ({"cnov.*": {}}, "no parameter that fits", "conv."),
    "a name that is shadowed": ({"*": {}, "bias": {}}, "taken all 5", "more special rule first"),
    "a part of a tuple": ({("bias", "*.gamma"): {}}, "'*.gamma'", "norm"),
    "settings that are none": ({"bias": 0.1}, "float", '{"lr": 0.1}'),
    "settings with params": ({"bias": {"params": []}}, "'params'", '{"lr": 0.1}'),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_rule_that_cannot_be_right_says_what_to_write(what):
    """Each mistake is named, with names that the model has."""
    rules, found, instead = WRONG[what]
    with pytest.raises(UsageError) as caught:
        lk.param_groups(Model(), rules)
    assert found in caught.value.found
    assert instead in caught.value.instead


def test_a_kind_that_the_model_lacks_is_an_error():
    """It says which kinds there are."""
    with pytest.raises(UsageError, match=r"kind that the model has \(bias, matrix\)"):
        lk.param_groups(nn.Linear(2, 2), {"embedding": {}})


def test_a_rule_for_frozen_parameters_only_is_an_error():
    """They are left out, and a rule for nothing else is told so."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    with pytest.raises(UsageError, match="only frozen parameters that fit '0"):
        lk.param_groups(model, {"0.*": {"lr": 0.1}})
