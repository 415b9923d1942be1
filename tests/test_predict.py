"""predict: what the step function makes of each batch, in the order of the data."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from feeds import (
    Counted,
    Samples,
    Stream,
    children,
    finish,
    loader,
    mean_output,
    numbered,
    tiny_state,
)


def number(state, batch):
    return batch[:, 0] + 0


@pytest.mark.parametrize(
    "data",
    [numbered(5), loader(5), loader(5, 2), loader(5, kind=Stream), Counted(numbered(5)),
     iter(numbered(5)), DataLoader(Samples(5), batch_size=2),
     DataLoader(Samples(5), batch_sampler=BatchSampler(SequentialSampler(range(5)), 2, False))],
    ids=["list", "loader", "workers", "stream", "iterable", "iterator", "batches", "sampler"],
)  # fmt: skip
def test_predictions_come_in_the_order_of_the_data(data):
    """Each sample once, in order, for any kind of data."""
    assert torch.cat([*lk.predict(number, tiny_state(), data)]).tolist() == [0, 1, 2, 3, 4]


def test_what_the_step_function_returns_comes_as_it_is():
    """Mappings, tuples and whatever else are passed on, nothing is required of them."""
    for output in ({"preds": 1}, (1, "text"), None):
        assert [*lk.predict(lambda state, x, o=output: o, tiny_state(), numbered(1))] == [output]


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(Samples(4), shuffle=True),
        DataLoader(Samples(4), sampler=SubsetRandomSampler(range(4))),
        DataLoader(Samples(4), sampler=WeightedRandomSampler([0.5] * 4, 4)),
        DataLoader(
            Samples(4), batch_sampler=BatchSampler(RandomSampler(Samples(4)), 2, drop_last=False)
        ),
    ],
    ids=["shuffle", "subset", "weighted", "batch sampler"],
)
def test_a_loader_that_shuffles_is_refused(data):
    """Predictions out of order are an error when predict is called, not a surprise afterwards."""
    with pytest.raises(lk.DataError, match=r"a loader that shuffles(.|\n)*shuffle=False"):
        lk.predict(number, tiny_state(), data)


def test_limits_are_checked_when_predict_is_called():
    """A fraction of data without a length fails before the first prediction is asked for."""
    with pytest.raises(lk.UsageError, match="without a length"):
        lk.predict(number, tiny_state(), Counted(numbered(5)), limit_batches=0.5)
    assert len([*lk.predict(number, tiny_state(), numbered(5), limit_batches=0.4)]) == 2


def test_empty_data_is_an_error():
    """No batch at all is a DataError."""
    with pytest.raises(lk.DataError, match="at least one batch"):
        next(lk.predict(number, tiny_state(), []))


def test_modes_hold_for_the_forward_alone():
    """Between two predictions the modules are in train mode and gradients are on."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.BatchNorm1d(1).eval())
    state, during = lk.TrainState(model), []

    def step(state, batch):
        during.append(([m.training for m in model.modules()], torch.is_grad_enabled()))
        return state.model(batch)

    before = [m.training for m in model.modules()]
    for prediction in lk.predict(step, state, numbered(3)):
        assert prediction.is_inference()
        assert [m.training for m in model.modules()] == before == [True, True, True, False]
        assert torch.is_grad_enabled()
    assert during == [([False] * 4, False)] * 3
    assert not next(lk.predict(step, state, numbered(1), inference_mode=False)).is_inference()


def test_training_between_predictions_is_training():
    """A loop may train on what it has just predicted (pseudo-labels), bit for bit as by hand."""
    ours, theirs, data = tiny_state(), tiny_state(), numbered(4, start=1)
    step = lk.train_step(mean_output)
    for batch, _ in zip(data, lk.predict(mean_output, ours, data), strict=True):
        step(ours, batch)
    finish(lk.run(step, theirs, data, max_epochs=1))
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())


def test_a_break_leaves_nothing_behind():
    """After a break the workers have ended, and so they have after an error in the body."""
    before = children()

    def stop(error):
        for _ in lk.predict(number, tiny_state(), loader(8, 1)):
            if error:
                raise error
            break

    stop(None)
    assert children() <= before
    with pytest.raises(RuntimeError) as kept:
        stop(RuntimeError())
    assert children() <= before
    del kept


def test_nothing_is_read_before_it_is_asked_for():
    """Predictions are made one at a time, as the loop asks for them."""
    data = Counted(numbered(5))
    predictions = lk.predict(number, tiny_state(), data)
    assert data.read == 0
    next(predictions)
    assert data.read == 1
