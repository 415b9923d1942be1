"""The first-hour checks: each mistake is found, and a sound training has none."""

import math

import loopkit as lk
import pytest
import torch
from loopkit.debug.check import _inputs
from torch import nn
from torch.nn import functional as F

from problems import classifier


class Net(nn.Module):
    """A sound classifier of tokens or numbers, in which a test plants one mistake."""

    def __init__(self, mixes=None, unused=False, dead=False, tokens=False, scale=1.0):
        super().__init__()
        self.embed = (
            nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(32, 16))
            if tokens
            else nn.Linear(8, 16)
        )
        self.norm, self.drop, self.head = nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 4)
        self.spare = nn.Linear(2, 2) if unused else None
        self.mixes, self.dead, self.scale = mixes, dead, scale

    def forward(self, inputs):
        hidden = self.embed(inputs)
        if self.mixes == "mean":
            hidden = hidden - hidden.mean(dim=0)
        if self.mixes == "view":
            hidden = hidden.T.reshape(len(inputs), -1)
        if self.mixes == "softmax":
            hidden = hidden.softmax(dim=0)
        if self.mixes == "one":
            hidden = hidden + hidden[:1]
        hidden = self.drop(F.relu(self.norm(hidden)))
        return self.head(hidden * (not self.dead)) * self.scale


def state_of(lr=0.003, optimizer=torch.optim.AdamW, hold=None, **mistakes):
    torch.manual_seed(0)
    model = Net(**mistakes)
    held = (hold or nn.Module.parameters)(model)
    return lk.TrainState(model, optimizer(held, lr=lr))


def batch_of(n=16, tokens=False):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 8, generator=generator)
    if tokens:
        inputs = torch.randint(50, (n, 4), generator=generator)
    return inputs, torch.arange(n) % 4


def check(state, function=classifier, batch=None, **options):
    return lk.debug.check(function, state, batch or batch_of(), **options)


STEPS = {
    "plain": classifier,
    "windows": lk.with_grad_accum(4)(classifier),
    "bf16": lk.with_amp("bf16")(classifier),
    "decorated": lk.compose(lk.with_ema(0.9), lk.with_clip(1.0))(classifier),
    "mapping": lambda s, b: {"loss": classifier(s, b), "weight": len(b[1])},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tokens", [False, True])
def test_a_sound_training_has_no_mistakes(step, tokens):
    """All is ok, for numbers and for tokens, whatever the step is made of."""
    report = check(state_of(tokens=tokens), STEPS[step], batch_of(tokens=tokens))
    assert [(f.about, f.words) for f in report.findings if f.level != "ok"] == []
    assert report.ok


def eval_mode(state):
    state.model.eval()
    return state


def frozen_norm(state):
    state.model.norm.eval()
    return state


def no_gradient(state, batch):
    hidden = state.model.embed(batch[0]).detach()
    return F.cross_entropy(state.model.head(state.model.norm(hidden)), batch[1])


INPUTS, LABELS = batch_of()
NAN = INPUTS.clone()
NAN[0, 0] = math.nan

# What is planted, and the level, the subject and the words of the finding.
PLANTED = {
    "a mean over the batch": (lambda: check(state_of(mixes="mean")), "WRONG", "samples", "depends on 15 others"),
    "a view over the batch": (lambda: check(state_of(mixes="view")), "WRONG", "samples", "in eval mode"),
    "a softmax over the batch": (lambda: check(state_of(mixes="softmax")), "WRONG", "samples", "15 others"),
    "the first sample in all": (lambda: check(state_of(mixes="one")), "WRONG", "samples", "1 others (such as 0)"),
    "tokens that are mixed": (
        lambda: check(state_of(mixes="mean", tokens=True), batch=batch_of(tokens=True)), "WRONG", "samples", "15 others",
    ),
    "one sample": (
        lambda: check(state_of(), lambda s, b: F.cross_entropy(s.model.head(s.model.embed(b[0])), b[1]), batch_of(1)),
        "note", "samples", "one sample",
    ),
    "a parameter that is not used": (lambda: check(state_of(unused=True)), "WRONG", "gradients", "none for 2 of 8 parameters: spare.weight"),
    "a detached part": (lambda: check(state_of(), no_gradient), "WRONG", "gradients", "embed.weight, embed.bias"),
    "dead units": (lambda: check(state_of(dead=True)), "LOOK", "gradients", "exactly zero for 5 of 6"),
    "a head that was forgotten": (
        lambda: check(state_of(hold=lambda m: m.embed.parameters())), "WRONG", "optimizer", "4 trainable parameters: norm.weight",
    ),
    "eval mode": (lambda: check(eval_mode(state_of())), "WRONG", "mode", "model.train()"),
    "a frozen norm": (lambda: check(frozen_norm(state_of())), "LOOK", "mode", "norm"),
    "NaN inputs": (lambda: check(state_of(), batch=(NAN, LABELS)), "WRONG", "inputs", "NaN or infinity"),
    "inputs from 0 to 255": (
        lambda: check(state_of(), batch=(INPUTS.abs() * 100, LABELS)), "LOOK", "inputs", "scale them",
    ),
    "one sample many times": (
        lambda: check(state_of(), batch=(INPUTS[:1].expand(16, 8).clone(), LABELS)), "LOOK", "inputs", "the same inputs",
    ),
    "one label": (
        lambda: check(state_of(), batch=(INPUTS, torch.ones(16, dtype=torch.int64))), "LOOK", "inputs", "the same labels",
    ),
    "a sure start": (lambda: check(state_of(scale=50.0)), "LOOK", "first loss", "far above log(4) = 1.386"),
    "a loss that is too low": (lambda: check(state_of(), lambda s, b: classifier(s, b) * 0.1), "LOOK", "first loss", "far below"),
    "a number of classes that was given": (lambda: check(state_of(), classes=1000), "LOOK", "first loss", "log(1000) = 6.908"),
    "no labels": (
        lambda: check(state_of(), lambda s, b: s.model(b[0]).square().mean(), (INPUTS,)), "note", "first loss", "pass classes=",
    ),
    "a NaN loss": (lambda: check(state_of(), lambda s, b: classifier(s, b) * math.nan), "WRONG", "first loss", "detect_overflow"),
    "a huge learning rate": (lambda: check(state_of(lr=1.0)), "LOOK", "learning rate", "very large"),
    "a tiny learning rate": (lambda: check(state_of(lr=1e-12)), "LOOK", "learning rate", "find_lr"),
    "a warm-up from zero": (
        lambda: check(state_of(), lk.with_schedule(lr=lambda n: 0.0)(classifier)), "LOOK", "learning rate", "by nothing",
    ),
    "a skipped update": (
        lambda: check(state_of(), lk.with_nonfinite("skip")(lambda s, b: classifier(s, b) * math.inf)),
        "WRONG", "learning rate", "skipped",
    ),
    "a loss that does not fall": (
        lambda: check(state_of(lr=0.1, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, maximize=True))),
        "WRONG", "one batch", "does not fall",
    ),
    "a loss that hardly falls": (lambda: check(state_of(lr=1e-6)), "LOOK", "one batch", "hardly"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_mistake_is_found(case):
    """The finding about its subject has the level and the words that a reader needs."""
    planted, level, about, words = PLANTED[case]
    report = planted()
    assert (report[about].level, words in report[about].words) == (level, True), report[about]
    assert report.ok == (level != "WRONG" and all(f.level != "WRONG" for f in report.findings))


def test_inputs_on_another_device_are_told():
    """Where the batch is not with the model, it is said what moves it."""
    finding = _inputs(torch.ones(2, 3), torch.device("meta"), 2)[0]
    assert finding.level == "LOOK"
    assert "the batch is on cpu and the model on meta" in finding.words
    assert "lk.to_device" in finding.words


def language(state, batch):
    """A mean over the next tokens."""
    logits = state.model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("classes_last", [True, False])
def test_the_number_of_classes_is_found_where_labels_are_tokens(classes_last):
    """It is the last dimension of logits over tokens, shifted or not, or the one after samples."""
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.randint(30, (4, 7))

    def images(state, batch):
        return F.cross_entropy(state.model(batch).transpose(1, 2), batch)

    report = lk.debug.check(language if classes_last else images, state, tokens)
    assert "log(30) = 3.401" in report["first loss"].words
    assert report["samples"].level == "ok"


def test_batch_norm_in_training_is_not_taken_for_mixing():
    """It mixes samples as it should; what is looked at is eval mode."""
    assert check(state_of())["samples"].level == "ok"


def test_the_text_is_a_line_or_more_for_each_check():
    """It counts what is wrong, names the step, and no line is wider than a page."""
    text = str(check(eval_mode(state_of(unused=True))))
    lines = text.splitlines()
    assert lines[0] == "classifier on a batch of 16 samples: 2 wrong, 0 to look at"
    assert all(len(line) <= 100 for line in lines)
    assert text.count("  WRONG  ") == 2
    for about in ("device", "inputs", "mode", "first loss", "gradients", "samples", "one batch"):
        assert any(line[9:].startswith(about) for line in lines)


def test_a_wrong_use_is_an_error_that_teaches():
    """Counts below one, no state, and a loader where one batch is asked for."""
    with pytest.raises(lk.UsageError, match="updates = 0"):
        check(state_of(), updates=0)
    with pytest.raises(lk.UsageError, match="classes = 0"):
        check(state_of(), classes=0)
    with pytest.raises(lk.UsageError, match="a Net as the state"):
        lk.debug.check(classifier, state_of().model, batch_of())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, LABELS), 16)
    for batches in (loader, iter(loader), lk.bar(loader, "train"), (b for b in loader)):
        with pytest.raises(lk.UsageError, match="which gives batches") as caught:
            lk.debug.check(classifier, state_of(), batches)
        assert "next(iter(loader))" in caught.value.instead
