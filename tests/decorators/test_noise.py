"""Noise on gradients and on embeddings."""

import math

import loopkit as lk
import pytest
import torch
from loopkit.testing import Problem, assert_bitwise_equal, check_decorator
from torch import nn
from torch.nn import functional as F

from problems import classifier, make_batches, make_state


@pytest.mark.parametrize("gamma", [0.0, 0.55])
def test_gradient_noise_is_the_papers(gamma):
    """Weights equal the loop by hand with N(0, eta / (1 + t)^gamma) on the mean gradient."""
    ours, theirs = make_state("dropout", "sgd"), make_state("dropout", "sgd")
    step = lk.compose(
        lk.with_clip(0.5), lk.with_grad_noise(0.3, gamma, seed=5), lk.with_grad_accum(2)
    )(classifier)
    torch.manual_seed(2)
    [*lk.run(step, ours, make_batches(6), max_epochs=1)]
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(2)
    batches = make_batches(6)
    for t in range(3):
        theirs.optimizer.zero_grad()
        for batch in batches[2 * t : 2 * t + 2]:
            (classifier(theirs, batch) / 2).backward()
        for p in theirs.model.parameters():
            noise = torch.empty_like(p).normal_(generator=generator)
            p.grad.add_(noise, alpha=math.sqrt(0.3 / (1 + t) ** gamma))
        nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.5)
        theirs.optimizer.step()
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())


def test_the_noise_has_the_variance_it_says():
    """With a zero gradient the update is the noise: its standard deviation is sqrt(eta)."""
    model = nn.Linear(300, 300)
    before = model.weight.detach().clone()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0))
    lk.with_grad_noise(0.04)(lambda s, x: s.model(x).sum() * 0)(state, torch.ones(1, 300))
    assert (model.weight - before).std().item() == pytest.approx(0.2, rel=0.02)


def test_gradient_noise_keeps_the_laws():
    """It compares, pickles, resumes bit for bit, and stands anywhere."""
    check_decorator(lk.with_grad_noise(0.1))
    state = make_state()
    step = lk.with_grad_noise(0.1)(classifier)
    step(state, make_batches(1)[0])
    branch = state.snapshot()
    for one in (state, branch):
        step(one, make_batches(2)[1])
    assert_bitwise_equal(branch.model.state_dict(), state.model.state_dict())


def test_all_ranks_draw_the_same_noise():
    """The noise does not depend on what the global generators drew."""
    states = [make_state() for _ in range(2)]
    for seed, state in enumerate(states):
        torch.manual_seed(seed)
        torch.rand(seed)
        lk.with_grad_noise(0.1)(classifier)(state, make_batches(1)[0])
    assert_bitwise_equal(states[0].model.state_dict(), states[1].model.state_dict())


class Words(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(9, 6), nn.Dropout(dropout), nn.Linear(6, 9)

    def forward(self, tokens):
        return self.head(self.drop(self.embed(tokens)).mean(1))


def words(state, batch):
    return F.cross_entropy(state.model(batch), batch[:, 0])


def make_words(dropout=0.0):
    torch.manual_seed(0)
    model = Words(dropout)
    return lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.5))


TOKENS = list(torch.randint(9, (6, 4, 5), generator=torch.Generator().manual_seed(3)))


def test_neftune_is_the_papers_noise():
    """Weights equal the loop by hand with uniform noise of alpha / sqrt(length * width)."""
    ours, theirs = make_words(0.2), make_words(0.2)
    torch.manual_seed(4)
    [*lk.run(lk.with_neftune(5)(words), ours, TOKENS, max_epochs=1)]
    torch.manual_seed(4)
    model = theirs.model
    for tokens in TOKENS:
        theirs.optimizer.zero_grad()
        x = model.embed(tokens)
        most = 5 / math.sqrt(x.size(1) * x.size(2))
        x = x + torch.zeros_like(x).uniform_(-most, most)
        F.cross_entropy(model.head(model.drop(x).mean(1)), tokens[:, 0]).backward()
        theirs.optimizer.step()
    assert_bitwise_equal(model.state_dict(), ours.model.state_dict())


def test_neftune_is_only_for_training():
    """Evaluating with the same step sees no noise, and the model keeps no hook."""
    state = make_words()
    step = lk.with_neftune(50)(words)
    step(state, TOKENS[0])
    noisy, plain = lk.evaluate(step, state, TOKENS), lk.evaluate(words, state, TOKENS)
    assert noisy == plain
    assert not state.model.embed._forward_hooks


def test_neftune_keeps_the_laws():
    """It compares, pickles, resumes bit for bit, and stands anywhere."""
    check_decorator(lk.with_neftune(5), Problem(make_words, words, TOKENS))


def test_the_embedding_is_found_by_transformers_way_or_by_name():
    """get_input_embeddings is asked first; a name is taken; what is unclear is an error."""

    class Two(Words):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(5, 6)

    class Asked(Two):
        def get_input_embeddings(self):
            return self.embed

    def changed(model, decorator):
        torch.manual_seed(1)
        state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
        return float(decorator(words)(state, TOKENS[0]).loss)

    for made in (Two, Asked):
        torch.manual_seed(0)
        model = made()
        plain = changed(model, lk.with_clip(1.0))
        assert changed(model, lk.with_neftune(5, embedding="embed")) != plain
        assert changed(model, lk.with_neftune(5, embedding="positions")) == plain  # is not called
    assert changed(model, lk.with_neftune(5)) != plain
    with pytest.raises(lk.UsageError, match=r"2 embeddings.*\['embed', 'positions'\]"):
        changed(Two(), lk.with_neftune(5))
    with pytest.raises(lk.UsageError, match="no such module"):
        changed(Two(), lk.with_neftune(5, embedding="tokens"))


WRONG = {
    "eta": lambda: lk.with_grad_noise(0),
    "gamma": lambda: lk.with_grad_noise(0.1, -1),
    "alpha": lambda: lk.with_neftune(0),
}


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_settings_are_told(setting):
    """A variance, exponent or strength that cannot be right names itself."""
    with pytest.raises(lk.UsageError, match=f"{setting} = "):
        WRONG[setting]()


def test_a_sparse_gradient_is_an_error():
    """Noise on a sparse gradient would make it dense: said so."""
    model = nn.Embedding(4, 2, sparse=True)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(lk.UsageError, match="sparse"):
        lk.with_grad_noise(0.1)(lambda s, x: s.model(x).sum())(state, torch.tensor([1]))
