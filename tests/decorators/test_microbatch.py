"""Micro-batches cut from a batch, as large as memory allows."""

import collections

import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.nested import rows_of
from loopkit.testing import assert_bitwise_equal, check_decorator
from torch.nn import functional as F

from problems import MODELS, classifier, make_batches, make_state, train, weighted_classifier


def by_hand(state, batches, most, *, weighted, clip=None):
    """Each batch in pieces, each piece with its share of the batch's mean."""
    losses = []
    for inputs, labels in batches:
        state.optimizer.zero_grad()
        found, total = [], 0
        for x, y in zip(inputs.split(most), labels.split(most), strict=True):
            share = (y != -100).sum().item() if weighted else len(x)
            loss = F.cross_entropy(state.model(x), y)
            if share:
                (loss * share).backward()
                found.append(loss.item() * share)
            total += share
        for parameter in state.model.parameters():
            parameter.grad /= total
        if clip:
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        state.optimizer.step()
        losses.append(sum(found) / total)
    return losses


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_loop_by_hand(most, weighted):
    """Pieces weigh by their samples, or by their labels, the short last one too."""
    ours, theirs = make_state(dtype=torch.float64), make_state(dtype=torch.float64)
    batches = make_batches(4, size=8, dtype=torch.float64)
    if weighted:
        for i, (_, labels) in enumerate(batches):
            labels[: 2 * i] = -100
    step = lk.compose(lk.with_clip(0.3), lk.with_microbatch(most))(
        weighted_classifier if weighted else classifier
    )
    losses = train(step, ours, batches)
    wanted = by_hand(theirs, batches, most, weighted=weighted, clip=0.3)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, theirs.model.state_dict()[name], rtol=1e-10, atol=1e-13)
    assert ours.step == 4
    assert ours.samples == 32


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), most=st.integers(1, 12), weighted=st.booleans())
def test_the_gradient_is_that_of_the_whole_batch(size, most, weighted):
    """For any size and any cut, one update from the pieces is one from the batch."""
    cut, whole = (make_state(optimizer="sgd", dtype=torch.float64) for _ in range(2))
    batch = make_batches(1, size=size, dtype=torch.float64)[0]
    if weighted:
        batch[1][: size // 2] = -100
    function = weighted_classifier if weighted else classifier
    lk.with_microbatch(most)(function)(cut, batch)
    lk.train_step(function)(whole, batch)
    for ours, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cut.loss, whole.loss)
    assert cut.samples == size


def limited(most, seen, message=None):
    """A step function that runs out of memory, after its forward, above so many samples."""

    def function(state, batch):
        seen.append(len(batch[0]))
        loss = F.cross_entropy(state.model(batch[0]), batch[1])
        if len(batch[0]) > most:
            raise (
                RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory")
            )
        return loss

    return function


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("message", [None, "MPS backend out of memory (MPS allocated: 9 GB)"])
def test_auto_equals_having_known_the_size(model, message):
    """Weights, statistics, optimizer and random numbers are those of the size from the start."""
    found, known, seen = make_state(model), make_state(model), []
    batches = make_batches(4, size=12)
    others = [lk.with_clip(0.3), lk.with_amp("bf16"), lk.with_ema(0.9)]
    auto = lk.compose(*others, lk.with_microbatch("auto"))(limited(3, seen, message))
    losses = train(auto, found, batches)
    wanted = train(lk.compose(*others, lk.with_microbatch(3))(classifier), known, batches)
    assert losses == wanted
    assert found.features["microbatch"].most == 3
    assert seen == [12, 6, 3, 3, 3, 3] + [3] * 4 * 3  # looked for once, then remembered
    saved, plain = found.state_dict(), known.state_dict()
    assert saved["features"].pop("microbatch") == {"most": 3}
    assert_bitwise_equal(saved, plain)


def test_an_error_in_a_later_piece_begins_the_update_anew():
    """Memory that runs out after some pieces had their backward pass leaves no gradient behind."""
    calls = collections.Counter()

    def late(state, batch):
        calls["all"] += 1
        if calls["all"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return F.cross_entropy(state.model(batch[0]), batch[1])

    found, known = make_state("conv"), make_state("conv")
    step = lk.with_microbatch("auto")(late)
    step.set_up(found).features["microbatch"].most = 4
    batch = make_batches(1, size=12)[0]
    step(found, batch)
    lk.with_microbatch(2)(classifier)(known, batch)
    assert found.features["microbatch"].most == 2
    assert_bitwise_equal(found.model.state_dict(), known.model.state_dict())


def test_the_size_is_saved_and_restored():
    """A resumed training does not look for the size again."""
    state, seen = make_state(), []
    step = lk.with_microbatch("auto")(limited(2, seen))
    batches = make_batches(2, size=8)
    step(state, batches[0])
    resumed = make_state(seed=3)
    resumed.load_state_dict(state.state_dict())
    seen.clear()
    step(resumed, batches[1])
    assert seen == [2] * 4


def test_one_sample_that_does_not_fit_is_the_error_itself():
    """The error of the device comes through, with a note; weights are as before."""
    state = make_state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        lk.with_microbatch("auto")(limited(0, []))(state, make_batches(1, size=4)[0])
    assert "one sample at a time does not fit" in caught.value.__notes__[0]
    assert_bitwise_equal(state.model.state_dict(), before)


def test_other_errors_come_through():
    """An error that is not about memory is not retried."""
    seen = []
    step = lk.with_microbatch("auto")(limited(1, seen, "shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        step(make_state(), make_batches(1)[0])
    assert len(seen) == 1


def test_layers_run_for_each_piece_and_sam_reads_them_twice():
    """With SAM, both passes are over the pieces, found by "auto" or known."""
    found, known, seen = make_state(), make_state(), []
    batch = make_batches(1, size=8)[0]
    for order in (
        [lk.with_sam(0.1), lk.with_microbatch("auto")],
        [lk.with_microbatch("auto"), lk.with_sam(0.1)],
    ):
        seen.clear()
        found, known = make_state(), make_state()
        lk.compose(*order)(limited(4, seen))(found, batch)
        lk.compose(lk.with_sam(0.1), lk.with_microbatch(4))(classifier)(known, batch)
        assert_bitwise_equal(found.model.state_dict(), known.model.state_dict())
        assert seen == [8, 4, 4, 4, 4]


def test_evaluating_and_predicting_do_not_see_it():
    """The same step evaluates and predicts whole batches, with the outputs of the function."""
    state = make_state()
    batches = make_batches(2, size=8)
    step = lk.with_microbatch(2)(classifier)
    train(step, state, batches)
    assert lk.evaluate(step, state, batches) == lk.evaluate(classifier, state, batches)
    with torch.no_grad():
        assert isinstance(step.forward(state, batches[0]), torch.Tensor)


def test_the_functions_own_numbers_are_means_over_the_batch():
    """0-d tensors of the mapping are weighted as the loss is."""

    def function(state, batch):
        logits = state.model(batch[0])
        accuracy = (logits.argmax(1) == batch[1]).double().mean()
        return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": accuracy}

    cut, whole = make_state(), make_state()
    batch = make_batches(1, size=7)[0]
    lk.with_microbatch(3)(function)(cut, batch)
    lk.train_step(function)(whole, batch)
    torch.testing.assert_close(cut.metrics["accuracy"], whole.metrics["accuracy"])


@pytest.mark.parametrize("decorator", [lk.with_microbatch(2), lk.with_microbatch("auto")], ids=repr)
def test_it_keeps_the_laws(decorator):
    """It compares, pickles, resumes bit for bit, and stands anywhere."""
    check_decorator(decorator)


Pair = collections.namedtuple("Pair", ["x", "texts"])


def test_batches_of_any_kind_are_cut():
    """Named tuples, mappings, arrays and lists of text are cut; numbers and settings stay."""
    batch = Pair(torch.arange(5), {"a": np.arange(10).reshape(5, 2), "t": [*"abcde"], "n": 3})
    piece = rows_of(batch, 1, 3, 5)
    assert isinstance(piece, Pair)
    assert piece.x.tolist() == [1, 2]
    assert piece.texts["a"].tolist() == [[2, 3], [4, 5]]
    assert (piece.texts["t"], piece.texts["n"]) == (["b", "c"], 3)
    assert piece.x.untyped_storage().data_ptr() == batch.x.untyped_storage().data_ptr()


def test_a_cut_of_ones_own():
    """cut= takes batches whose samples are elsewhere, such as in the second dimension."""

    def columns(batch, most):
        return [*batch.split(most, dim=1)]

    state = make_state(optimizer="sgd")
    whole = make_state(optimizer="sgd")
    batch = torch.randn(4, 6)
    # batch_size reads the first dimension: so the function says how much a piece counts
    function = lambda s, b: {"loss": s.model(b.T).square().mean(), "weight": b.shape[1]}  # noqa: E731
    lk.with_microbatch(2, cut=columns)(function)(state, batch)
    lk.train_step(function)(whole, batch)
    torch.testing.assert_close(state.model[0].weight, whole.model[0].weight)


class Ragged:
    def to(self, device):
        return self


BATCH = make_batches(1)[0]
WRONG = {
    "zero samples": (lambda: lk.with_microbatch(0), "n = 0"),
    "another word": (lambda: lk.with_microbatch("max"), "'max'"),
    "with accumulation": (
        lambda: lk.compose(lk.with_microbatch(2), lk.with_grad_accum(2))(classifier),
        "'split'",
    ),
    "a window": (
        lambda: lk.with_microbatch(2)(classifier)(make_state(), lk.Window([BATCH])),
        "window of 1",
    ),
    "another first dimension": (
        lambda: lk.with_microbatch(2)(classifier)(make_state(), (*BATCH, torch.ones(3))),
        "Tensor of shape [3]",
    ),
    "an object that cannot be cut": (
        lambda: lk.with_microbatch(2)(classifier)(make_state(), (*BATCH, Ragged())),
        "a Ragged in it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Sizes that cannot be right and batches that cannot be cut are told with the remedy."""
    wrong, found = WRONG[case]
    with pytest.raises(lk.LoopkitError) as caught:
        wrong()
    assert found in str(caught.value)
