"""Gradient accumulation: the gradient of the one big batch, whatever the windows."""

import copy

import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.testing import assert_bitwise_equal
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from problems import classifier, cut, make_batches, make_state, weighted_classifier


def sgd_state(dtype=torch.float64):
    return make_state("mlp", "sgd", dtype)


def gradients(state):
    return [p.grad.clone() for p in state.parameters()]


def token_batches(sizes, counted, dtype=torch.float64):
    """Batches of the given sizes, of whose labels the first `counted` are valid."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for size, valid in zip(sizes, counted, strict=True):
        labels = torch.randint(3, (size,), generator=generator)
        labels[min(valid, size) :] = -100
        batches.append((torch.randn(size, 4, generator=generator, dtype=dtype), labels))
    return batches


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6).filter(
    lambda pairs: any(valid for _, valid in pairs)
)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes, lazy=st.booleans())
def test_unequal_micro_batches_give_the_gradient_of_the_one_big_batch(shapes, lazy):
    """K micro-batches of any valid-label counts, zero included, equal the big batch to 1e-12."""
    batches = token_batches(*zip(*shapes, strict=True))
    ours, theirs = sgd_state(), sgd_state()
    step = lk.with_grad_accum(len(batches))(weighted_classifier)
    step(ours, lk.Window(iter(batches) if lazy else batches))

    inputs, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    loss = F.cross_entropy(theirs.model(inputs), labels, ignore_index=-100)
    loss.backward()
    for our, their in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.loss, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("window", [1, 2])
def test_an_update_over_nothing_is_skipped(as_tensor, window):
    """With a weight of zero throughout nothing changes, momentum and weight decay included."""

    def nothing(state, batch):
        if state.step != 1:
            return {"loss": classifier(state, batch), "weight": 1}
        loss = (state.model(batch[0]) * 0).sum() / torch.zeros((), dtype=batch[0].dtype)
        return {"loss": loss, "weight": torch.tensor(0) if as_tensor else 0}

    state = make_state(optimizer="momentum")
    step = lk.compose(lk.with_grad_accum(window), lk.with_nonfinite("raise"))(nothing)
    step(state, lk.Window(make_batches(window)))
    before = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()))
    step(state, lk.Window(make_batches(window)))
    assert not state.applied
    assert state.loss.isnan()
    assert_bitwise_equal((state.model.state_dict(), state.optimizer.state_dict()), before)
    assert step(state, lk.Window(make_batches(window))).applied


def test_auxiliary_numbers_are_means_by_weight_over_the_window():
    """A 0-d tensor that the step returns is averaged over the window by the weights."""

    def step_function(state, batch):
        inputs, labels = batch
        loss = F.cross_entropy(state.model(inputs), labels)
        return {"loss": loss, "weight": len(labels), "size": torch.tensor(float(len(labels)))}

    state = sgd_state(torch.float32)
    batches = [make_batches(1, size)[0] for size in (1, 3)]
    lk.with_grad_accum(2)(step_function)(state, lk.Window(batches))
    assert state.metrics["size"].item() == (1 * 1 + 3 * 3) / 4


@pytest.mark.parametrize("weight", [None, lambda n: n, torch.tensor])
@pytest.mark.parametrize("window", [1, 2])
def test_numbers_of_the_host_are_means_as_tensors_are(weight, window):
    """Python's and NumPy's numbers and bools come out as 0-d tensors, with the means of those."""

    def step_function(state, batch):
        size, given = len(batch[1]), {} if weight is None else {"weight": weight(len(batch[1]))}
        numbers = {"float": 0.1 * size, "int": size, "bool": size > 1, "numpy": np.float32(size)}
        tensors = {f"tensor/{n}": torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}
        return {"loss": classifier(state, batch), **numbers, **tensors, **given, "each": batch[1]}

    state = sgd_state(torch.float32)
    batches = [make_batches(1, size)[0] for size in (1, 3)][:window]
    lk.with_grad_accum(window)(step_function)(state, lk.Window(batches))
    found = {name: value.item() for name, value in state.metrics.items()}
    share = 1 if window == 1 else 2 if weight is None else (1 + 9) / 4
    assert (found["int"], found["numpy"]) == (share, share)
    assert all(found[f"tensor/{name}"] == found[name] for name in ("float", "int", "bool", "numpy"))
    assert "each" not in found


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["list", "generator", "iterable dataset"])
@pytest.mark.parametrize(("count", "window"), [(7, 3), (6, 3), (2, 4), (1, 5)])
def test_short_last_windows_are_exact_for_sized_and_unsized_data(kind, count, window):
    """The tail of an epoch, and a too short epoch, is the mean over what it holds."""
    batches = make_batches(count)
    data = {
        "list": lambda: batches,
        "generator": lambda: iter(batches),
        "iterable dataset": lambda: DataLoader(Stream(batches), batch_size=None),
    }[kind]()
    ours, theirs = make_state(), make_state()
    epoch_ends = [
        state.epoch_end
        for state in lk.run(lk.with_grad_accum(window)(classifier), ours, data, max_epochs=1)
    ]
    for micro_batches in cut(batches, window):
        theirs.optimizer.zero_grad()
        for batch in micro_batches:
            loss = classifier(theirs, batch)
            (loss / len(micro_batches) if len(micro_batches) > 1 else loss).backward()
        theirs.optimizer.step()
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert epoch_ends == [False] * (-(-count // window) - 1) + [True]


@pytest.mark.parametrize("sized", [True, False])
def test_nothing_leaks_over_the_end_of_an_epoch(sized):
    """Each epoch's windows hold that epoch's batches alone."""
    seen = []

    def spy(state, batch):
        seen.append((state.epoch, int(batch[0, 0])))
        return state.model(batch).sum()

    class Unsized:
        def __iter__(self):
            return iter(batches)

    batches = [torch.full((2, 4), float(i)) for i in range(5)]
    state = sgd_state(torch.float32)
    taken = [
        (s.epoch, s.batch, len(s.outcome.parts))
        for s in lk.run(
            lk.with_grad_accum(3)(spy), state, batches if sized else Unsized(), max_epochs=2
        )
    ]
    assert taken == [(0, 3, 3), (0, 5, 2), (1, 3, 3), (1, 5, 2)]
    assert seen == [(epoch, i) for epoch in range(2) for i in range(5)]


def test_the_window_may_change_by_epoch_and_by_function():
    """{0: 1, 2: 3} and a function of the clock give the windows that they say."""
    batches = make_batches(4)
    by_epoch, by_function = make_state(), make_state()
    steps = lk.run(lk.with_grad_accum({0: 1, 2: 3})(classifier), by_epoch, batches, max_epochs=3)
    assert [len(s.outcome.parts) for s in steps] == [1, 1, 1, 1, 1, 1, 1, 1, 3, 1]
    steps = lk.run(
        lk.with_grad_accum(lambda clock: clock.step + 1)(classifier), by_function, batches,
        max_epochs=2,
    )  # fmt: skip
    assert [len(s.outcome.parts) for s in steps] == [1, 2, 1, 4]


def test_windows_by_hand_train_as_run_does():
    """A plain loop over lk.windows makes the same updates as run."""
    ours, theirs = make_state(), make_state()
    step = lk.with_grad_accum(3)(classifier)
    for _ in lk.run(step, ours, make_batches(7), max_epochs=1):
        pass
    for window in lk.windows(make_batches(7), 3):
        step(theirs, window)
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert (theirs.step, theirs.samples) == (3, 35)


def test_a_lazy_window_is_read_one_micro_batch_ahead():
    """A window of unknown length never holds more than the current and the next micro-batch."""
    taken = []

    def stream():
        for i, batch in enumerate(make_batches(4)):
            taken.append(i)
            yield batch

    ahead = []

    def spy(state, batch):
        ahead.append(len(taken))
        return classifier(state, batch)

    lk.with_grad_accum(4)(spy)(make_state(), lk.Window(stream()))
    assert ahead == [2, 3, 4, 4]


def test_clearing_gradients_within_a_window_is_an_error():
    """A zero_grad left in the step function would leave the last micro-batch alone."""

    def step(state, batch):
        state.optimizer.zero_grad()
        return classifier(state, batch)

    with pytest.raises(lk.OutputError, match="zero_grad"):
        lk.run(lk.with_grad_accum(2)(step), make_state(), make_batches(4), max_epochs=1).finish()
