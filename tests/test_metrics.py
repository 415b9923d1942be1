"""What evaluate measures with, and how results are spelled out."""

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.metrics import _is_additive, meters, numbers
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError
from torchmetrics.wrappers import MinMaxMetric


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (0.5, {"f": 0.5}),
        (3, {"f": 3.0}),
        (torch.tensor(0.5), {"f": 0.5}),
        (torch.tensor([0.5, 1.0]), {"f/0": 0.5, "f/1": 1.0}),
        (torch.eye(2), {"f/0/0": 1.0, "f/0/1": 0.0, "f/1/0": 0.0, "f/1/1": 1.0}),
        (np.float64(0.5), {"f": 0.5}),
        (np.array(0.5), {"f": 0.5}),
        (np.array([0.5, 1.0]), {"f/0": 0.5, "f/1": 1.0}),
        ((torch.tensor(1.0), [2, 3]), {"f/0": 1.0, "f/1/0": 2.0, "f/1/1": 3.0}),
        ({"a": torch.tensor(1.0), 2: {"b": 2}}, {"f/a": 1.0, "f/2/b": 2.0}),
        ([], {}),
    ],
)
def test_results_are_spelled_out_as_floats(value, spelled):
    """Numbers keep the name; arrays, sequences and mappings add a part for each item."""
    found = dict(numbers("f", value))
    assert found == spelled
    assert all(type(number) is float for number in found.values())


def test_a_collection_alone_needs_no_name():
    """Its metrics have names of their own, where a single metric goes by its class."""
    accuracy = MulticlassAccuracy(3)
    assert [m.name for m in meters(MetricCollection({"a": accuracy}))] == [""]
    assert [m.name for m in meters(accuracy)] == ["MulticlassAccuracy"]
    assert meters(None) == []


def test_functions_get_everything_at_once_and_keep_nothing():
    """A function is called once with all batches joined, 0-d tensors and lists included."""
    calls = []
    (meter,) = meters({"f": (lambda *columns: calls.append(columns) or 1.0, "x", "n", "names")})
    for _ in range(2):
        meter.start(torch.device("cpu"))
        meter.update({"x": torch.ones(2), "n": torch.tensor(1), "names": ["a", "b"]})
        meter.update({"x": torch.zeros(1), "n": torch.tensor(2), "names": ("c",)})
        assert dict(meter.results(lk.Ranks())) == {"f": 1.0}
    assert len(calls) == 2
    for x, n, names in calls:
        assert (x.tolist(), n.tolist(), names) == ([1, 1, 0], [1, 2], ["a", "b", "c"])


def test_a_metric_begins_anew():
    """What a metric gathered before it was handed in does not count."""
    metric = MulticlassAccuracy(2, average="micro")
    metric.update(torch.tensor([0, 0]), torch.tensor([1, 1]))
    (meter,) = meters({"accuracy": metric})
    meter.start(torch.device("cpu"))
    meter.update({"preds": torch.tensor([1]), "target": torch.tensor([1])})
    assert dict(meter.results(lk.Ranks())) == {"accuracy": 1.0}


@pytest.mark.parametrize("sizes", [[4] * 40, [4] * 17 + [1], [1, 2, 3, 4, 4, 4, 2]])
def test_joined_updates_leave_the_state_of_updates_one_by_one(sizes):
    """Counting metrics are updated with several batches at once, and find the same, bit for bit."""
    kinds = (MulticlassAccuracy, MulticlassF1Score, MulticlassConfusionMatrix)
    ours, theirs = (MetricCollection([kind(3) for kind in kinds]) for _ in range(2))
    batches = [(torch.randn(n, 3), torch.randint(3, (n,))) for n in sizes]
    state = lk.TrainState(torch.nn.Linear(1, 1))
    scores = lk.evaluate(
        lambda state, batch: {"preds": batch[0], "target": batch[1]}, state, batches, ours
    )
    for batch in batches:
        theirs.update(*batch)
    assert scores == {k: v for name, x in theirs.compute().items() for k, v in numbers(name, x)}
    assert ours["MulticlassAccuracy"]._update_count < len(sizes) or len(sizes) < 9


def test_metrics_that_look_at_each_batch_get_each_batch():
    """Sums of floats, wrappers, and metrics that guess logits by the batch are not joined."""
    for metric in (BinaryAccuracy(), MeanSquaredError(), MinMaxMetric(BinaryAccuracy())):
        assert not _is_additive(metric)
    assert _is_additive(MulticlassAccuracy(3))
