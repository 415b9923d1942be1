"""Optimizers by name, and the groups for what decays and what does not."""

import importlib.util
import sys

import loopkit as lk
import pytest
import torch
from loopkit import MissingExtraError, UsageError
from loopkit.optim.create import EXTRAS
from torch import nn
from torch.nn import functional as F


class Gpt(nn.Module):
    """A small language model: tied head, norms, attention with raw parameters, a convolution."""

    def __init__(self, width=8, words=16):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.scale * self.mlp(self.norm2(x)))


def names_of(model, group):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


NO_DECAY = {
    *("conv.bias", "norm1.weight", "norm1.bias", "norm2.weight", "attention.in_proj_bias"),
    *("attention.out_proj.bias", "mlp.0.bias", "mlp.2.bias", "scale"),
}
MATRICES = {"attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"}
SETTINGS = {"lbfgs": {}, "muon": {}}


@pytest.mark.parametrize(
    "name",
    "adadelta adafactor adagrad adam adamax adamw asgd lbfgs nadam radam rmsprop rprop sgd".split(),
)
def test_an_optimizer_by_name_is_torchs(name):
    """The same class with the same settings: three updates end at the same weights."""
    classes = {n.lower(): made for n, made in vars(torch.optim).items() if isinstance(made, type)}
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        lk.create_optimizer(ours.parameters(), name, lr=0.01),
        classes[name](theirs.parameters(), lr=0.01),
    ]
    assert type(optimizers[0]) is type(optimizers[1])
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step(lambda: torch.zeros(()))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_settings_reach_the_optimizer():
    """Settings, also fused, are the constructor's; parameters may be named or in groups."""
    model = nn.Linear(3, 2)
    adamw = lk.create_optimizer(
        model.named_parameters(), "adamw", lr=0.01, betas=(0.9, 0.95), fused=True
    )
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    assert adamw.param_groups[0]["fused"] is True
    assert adamw.param_groups[0]["param_names"] == ["weight", "bias"]
    groups = [{"params": model.weight, "lr": 1.0}, {"params": [model.bias]}]
    with pytest.raises(UsageError, match="is no list"):
        lk.create_optimizer(groups, "sgd", lr=0.1)
    groups[0]["params"] = [model.weight]
    sgd = lk.create_optimizer(groups, "sgd", lr=0.1)
    assert [group["lr"] for group in sgd.param_groups] == [1.0, 0.1]
    assert groups[1] == {"params": [model.bias]}


def test_a_learning_rate_can_be_a_tensor():
    """A tensor stays that tensor, for optimizers that are compiled or captured."""
    lr = torch.tensor(0.1)
    made = lk.create_optimizer(nn.Linear(1, 1).parameters(), "adamw", lr=lr)
    assert made.param_groups[0]["lr"] is lr


def test_biases_and_norms_do_not_decay():
    """Every parameter is in exactly one of two groups; tied ones once; vectors do not decay."""
    model = Gpt()
    optimizer = lk.configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    no_decay, decay = optimizer.param_groups
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert names_of(model, no_decay) == NO_DECAY
    assert names_of(model, decay) == MATRICES | {"embed.weight", "conv.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 15


def test_embeddings_and_names_can_be_exempt_too():
    """`no_decay` takes kinds and patterns; a tied weight goes by any of its names."""
    for words in (("bias", "norm", "embedding"), ("bias", "norm", "head.*")):
        model = Gpt()
        made = lk.configure_optimizer(model, "sgd", lr=1e-3, weight_decay=0.1, no_decay=words)
        assert names_of(model, made.param_groups[0]) == NO_DECAY | {"embed.weight"}
    nothing = lk.configure_optimizer(Gpt(), "sgd", lr=1e-3, weight_decay=0.1, no_decay=())
    assert [group["name"] for group in nothing.param_groups] == ["decay"]
    only = lk.configure_optimizer(nn.LayerNorm(3), "sgd", lr=1e-3, weight_decay=0.1)
    assert [group["name"] for group in only.param_groups] == ["no_decay"]


def test_frozen_parameters_are_left_out():
    """What does not require gradients is not handed to the optimizer, as with adapters."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    optimizer = lk.configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model[1].parameters()}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    """One learning rate; embeddings, convolutions, vectors and what is tied are AdamW's."""
    model = Gpt()
    optimizer = lk.configure_optimizer(model, "muon", lr=1e-3, weight_decay=0.1)
    routed = {
        name: group["optimizer"]
        for group in optimizer.param_groups
        for name in names_of(model, group)
    }
    assert {name for name, to in routed.items() if to == "muon"} == MATRICES
    assert {to for name, to in routed.items() if name not in MATRICES} == {"adamw"}
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3
        assert group["weight_decay"] == (0.0 if group["name"] == "no_decay" else 0.1)
    assert optimizer.optimizers["muon"].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon", "rmsprop"])
def test_a_language_model_trains_with_any(name):
    """Forty updates of a composed step with a schedule make the loss fall by half."""
    model = Gpt()
    lr = {"sgd": 0.5, "muon": 0.02, "adafactor": 0.05}.get(name, 0.01)
    optimizer = lk.configure_optimizer(model, name, lr=lr, weight_decay=0.01)
    schedule = lk.warmup(5, peak=lr) >> lk.cosine(35)
    step = lk.with_clip(1.0)(lk.with_schedule(lr=schedule)(next_token))
    state = lk.TrainState(model, optimizer)
    tokens = torch.arange(64).reshape(4, 16) % 16
    losses = [float(step(state, tokens).loss) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def next_token(state, tokens):
    logits = state.model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not installed("schedulefree"), reason="needs schedulefree")
@pytest.mark.parametrize("kind", ["adamw", "radam", "sgd"])
def test_schedule_free_optimizers_train_and_evaluate(kind):
    """They are ready for the first step, and hold other weights for evaluation."""
    model = Gpt()
    name = f"schedule_free_{kind}"
    optimizer = lk.configure_optimizer(model, name, lr=0.1, weight_decay=0.0)
    state = lk.TrainState(model, optimizer)
    tokens = torch.arange(64).reshape(4, 16) % 16
    first = float(lk.train_step(next_token)(state, tokens).loss)
    for _ in range(40):
        lk.train_step(next_token)(state, tokens)
    optimizer.eval()
    assert next_token(state, tokens) < 0.8 * first


@pytest.mark.skipif(not installed("torchao"), reason="needs torchao")
@pytest.mark.filterwarnings(
    "ignore:invalid escape:DeprecationWarning"
)  # importing torchao warns of its own code
@pytest.mark.parametrize("name", ["adam_8bit", "adamw_8bit", "adamw_4bit", "adamw_fp8"])
def test_optimizers_of_torchao_are_made(name):
    """The class is torchao's, with our groups."""
    optimizer = lk.configure_optimizer(Gpt(), name, lr=0.1, weight_decay=0.1)
    assert type(optimizer).__module__.startswith("torchao")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def trained_with(optimizer, model):
    state = lk.TrainState(model, optimizer)
    tokens = torch.arange(64).reshape(4, 16) % 16
    for _ in range(8):
        lk.with_clip(1.0)(next_token)(state, tokens)
    return model


def trained_by_hand(optimizers, model):
    state = lk.TrainState(model)
    tokens = torch.arange(64).reshape(4, 16) % 16
    for _ in range(8):
        model.zero_grad()
        next_token(state, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return model


def seeded_gpt():
    torch.manual_seed(0)
    return Gpt(width=64, words=128)  # so large that torchao quantizes some of the state


@pytest.mark.skipif(
    not (installed("torchao") and installed("schedulefree")), reason="needs both packages"
)
@pytest.mark.filterwarnings("ignore")  # importing torchao warns of its own code
@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_an_optimizer_of_a_package_trains_as_by_hand(name):
    """Weights after eight updates equal those of the package's own class in a loop by hand."""
    _, module, made = EXTRAS[name]
    ours, theirs = seeded_gpt(), seeded_gpt()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        trained_with(lk.create_optimizer(ours.parameters(), name, lr=0.01), ours)
        by_hand = getattr(importlib.import_module(module), made)(theirs.parameters(), lr=0.01)
        getattr(by_hand, "train", lambda: None)()
        trained_by_hand([by_hand], theirs)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert not torch.equal(ours.head.weight, seeded_gpt().head.weight)


def test_muon_beside_adamw_trains_as_by_hand():
    """Weights equal those of two optimizers of torch, each stepped for its own parameters."""
    ours, theirs = seeded_gpt(), seeded_gpt()
    trained_with(lk.configure_optimizer(ours, "muon", lr=0.01, weight_decay=0.1), ours)
    named = dict(theirs.named_parameters())
    matrices = [named.pop(name) for name in sorted(MATRICES, key=[*named].index)]
    exempt = [named.pop(name) for name in [*named] if name in NO_DECAY]
    adamw = torch.optim.AdamW(
        [{"params": exempt, "weight_decay": 0.0}, {"params": [*named.values()]}],
        lr=0.01, weight_decay=0.1,
    )  # fmt: skip
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    trained_by_hand([muon, adamw], theirs)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free_adamw"])
def test_a_package_that_is_not_installed_is_named(name, monkeypatch):
    """The error says which package, and how it is installed."""
    for module in ("torchao", "torchao.optim", "schedulefree"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install (torchao|schedulefree)") as caught:
        lk.create_optimizer(nn.Linear(1, 1).parameters(), name, lr=0.1)
    assert isinstance(caught.value, ImportError)


def create(name="adamw", lr=0.1, params=None, **settings):
    params = nn.Linear(2, 2).parameters() if params is None else params
    return lk.create_optimizer(params, name, lr, **settings)


WRONG = {
    "a name with a typo": (
        lambda: create("admw"),
        "'admw'",
        "'adamw'; known are adadelta, adafactor",
    ),
    "a name in capitals": (
        lambda: create("AdamW"),
        "'AdamW'",
        "'adamw'; known are adadelta, adafactor",
    ),
    "a name of Hugging Face's": (lambda: create("adamw_torch"), "'adamw_torch'", "'adamw'"),
    "a fused one of theirs": (
        lambda: create("adamw_torch_fused"),
        "'adamw_torch_fused'",
        "'adamw', fused=True",
    ),
    "an 8-bit one of theirs": (
        lambda: create("paged_adamw_8bit"),
        "'paged_adamw_8bit'",
        "'adamw_8bit'",
    ),
    "a name of nothing": (lambda: create("xyz"), "'xyz'", "one of adadelta, adafactor"),
    "a name that is no name": (lambda: create(torch.optim.SGD), "torch.optim", "adamw"),
    "a setting with a typo": (
        lambda: create(beta=(0, 0)),
        "'beta', which adamw",
        "'betas'; known",
    ),
    "a setting of another": (lambda: create("sgd", betas=(0, 0)), "'betas'", "momentum"),
    "a setting of a group with a typo": (
        lambda: create(params=[{"params": [torch.zeros(2)], "wieght_decay": 0.0}]),
        "'wieght_decay'",
        "'weight_decay'; known",
    ),
    "a learning rate below 0": (lambda: create(lr=-1.0), "lr = -1.0", "0 or more"),
    "a learning rate of nan": (lambda: create(lr=float("nan")), "lr = nan", "0 or more"),
    "a learning rate in words": (lambda: create(lr="3e-4"), "'3e-4' (str)", "0 or more"),
    "two learning rates": (lambda: create(lr=torch.ones(2)), "(Tensor)", "0 or more"),
    "no parameters": (lambda: create(params=iter(())), "no parameters", "read once"),
    "groups without parameters": (
        lambda: create(params=[{"params": []}]),
        "no parameters",
        "read once",
    ),
    "a group without params": (lambda: create(params=[{"lr": 1.0}]), "['lr']", '"params"'),
    "a model": (lambda: create(params=nn.Linear(1, 1)), "Linear", "configure_optimizer(model"),
    "a tensor": (lambda: create(params=torch.zeros(1)), "Tensor", "a list"),
    "muon for a bias": (
        lambda: create("muon"),
        "of shape [2]",
        'configure_optimizer(model, "muon"',
    ),
    "a frozen model": (
        lambda: lk.configure_optimizer(nn.Linear(1, 1).requires_grad_(False), "sgd", 0.1, 0.1),
        "no parameter to train among 2",
        "require gradients",
    ),
    "muon without matrices": (
        lambda: lk.configure_optimizer(nn.LayerNorm(3), "muon", 0.1, 0.1),
        "'matrix'",
        "(norm)",
    ),
    "no_decay as text": (
        lambda: lk.configure_optimizer(Gpt(), "sgd", 0.1, 0.1, no_decay="bias"),
        "str",
        "('bias',)",
    ),
    "no_decay of nothing": (
        lambda: lk.configure_optimizer(Gpt(), "sgd", 0.1, 0.1, no_decay=("*.gamma",)),
        "'*.gamma'",
        "kind that the model has",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_call_that_cannot_be_right_says_what_to_write(what):
    """Each mistake is named with its value and the remedy, before the first update."""
    make, found, instead = WRONG[what]
    with pytest.raises(UsageError) as caught:
        make()
    assert found in caught.value.found
    assert instead in caught.value.instead
