"""evaluate: the same figures whatever the batch size, and nothing left changed behind."""

import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, mean_absolute_error, precision_recall_fscore_support
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from feeds import Counted, SizedStream, Stream, children, loader, numbered, tiny_state
from problems import classifier, make_batches, make_state

SIZES = (1, 7, 64, 101)
INPUTS = torch.randn(101, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LABELS = torch.randint(3, (101,), generator=torch.Generator().manual_seed(6))


def cut(size, inputs=INPUTS, labels=LABELS):
    return [*zip(inputs.split(size), labels.split(size), strict=True)]


def full(state, batch):
    """A mean over samples, two more of them, and what metrics read."""
    inputs, labels = batch
    logits = state.model(inputs)
    return {
        "loss": F.cross_entropy(logits, labels),
        "margin": logits.max(dim=1).values.mean(),
        "inputs": inputs.mean(),
        "preds": logits,
        "target": labels,
        "count": f"{len(inputs)} samples",
        "mean": inputs.mean().item(),
        "nothing": None,
    }


def weighted(state, batch):
    """A mean over the labels below 2, with their number."""
    inputs, labels = batch
    labels = labels.masked_fill(labels == 2, -100)
    loss = F.cross_entropy(state.model(inputs), labels, ignore_index=-100)
    return {"loss": loss, "weight": (labels != -100).sum()}


def macro_f1(preds, target):
    return f1_score(target, preds.argmax(1), average="macro")


def each_f1(preds, target):
    return f1_score(target, preds.argmax(1), average=None)


def all_scores(preds, target):
    return precision_recall_fscore_support(target, preds.argmax(1))


METRICS = {
    "none": lambda: None,
    "metric": lambda: MulticlassAccuracy(3),
    "collection": lambda: MetricCollection(
        {"accuracy": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)}
    ),
    "mapping": lambda: {
        "accuracy": MulticlassAccuracy(3),
        "each": MulticlassAccuracy(3, average=None),
        "two": MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)]),
        "f1": macro_f1,
        "each f1": each_f1,
        "all": all_scores,
        "largest": (lambda logits: logits.max(), "preds"),
        "error": (mean_absolute_error, "target", "target"),
    },
}


def closely(scores):
    return pytest.approx(scores, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("metrics", METRICS)
def test_figures_do_not_depend_on_the_batch_size(metrics):
    """Losses, other numbers, torchmetrics, collections and functions agree to 1e-12."""
    state = make_state("mlp", dtype=torch.float64)
    scores = [lk.evaluate(full, state, cut(size), METRICS[metrics]()) for size in SIZES]
    assert all(score == closely(scores[-1]) for score in scores)
    logits = state.model(INPUTS).detach()
    assert scores[0]["loss"] == closely(F.cross_entropy(logits, LABELS).item())
    assert scores[0]["margin"] == closely(logits.max(dim=1).values.mean().item())
    assert all(type(value) is float for value in scores[0].values())


def test_the_names_of_the_results():
    """0-d tensors, numbers and metrics keep their names; what is no scalar is spelled out."""
    state = make_state("mlp", dtype=torch.float64)
    plain = {"loss", "margin", "inputs", "mean"}
    assert lk.evaluate(full, state, cut(50)).keys() == plain
    found = {name: lk.evaluate(full, state, cut(50), METRICS[name]()) for name in METRICS}
    assert found["metric"].keys() == plain | {"MulticlassAccuracy"}
    assert found["collection"].keys() == plain | {"accuracy", "f1"}
    assert found["mapping"].keys() == plain | {
        "accuracy", "f1", "largest", "error",
        *(f"{name}/{i}" for name in ("each", "each f1") for i in range(3)),
        *(f"two/Multiclass{name}" for name in ("Accuracy", "F1Score")),
        *(f"all/{i}/{j}" for i in range(4) for j in range(3)),
    }  # fmt: skip
    assert found["mapping"]["accuracy"] == found["metric"]["MulticlassAccuracy"]


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), dtype=st.sampled_from([64, 32]))
@settings(max_examples=50, deadline=None)
def test_a_weighted_loss_is_the_mean_over_all_that_was_counted(sizes, dtype):
    """Batches of any sizes, some over nothing at all, give the mean over the valid labels."""
    state = make_state("mlp", dtype=getattr(torch, f"float{dtype}"))
    inputs, labels = INPUTS[: sum(sizes)].to(getattr(torch, f"float{dtype}")), LABELS[: sum(sizes)]
    batches = [*zip(inputs.split(sizes), labels.split(sizes), strict=True)]
    whole = weighted(state, (inputs, labels))["loss"].item()
    close = pytest.approx(whole, rel={64: 1e-12, 32: 1e-5}[dtype], nan_ok=True)
    assert lk.evaluate(weighted, state, batches) == {"loss": close}


@pytest.mark.parametrize("weight", [None, lambda n: n, torch.tensor])
def test_numbers_of_the_host_are_means_as_tensors_are(weight):
    """Python's and NumPy's numbers and bools, weighted alike, in float64; a vector is no score."""

    def step(state, batch):
        size, value = len(batch), batch.sum().item()
        given = {} if weight is None else {"weight": weight(2 * size)}
        numbers = {"float": value, "int": size, "bool": size > 1, "numpy": np.float32(value)}
        tensors = {f"tensor/{name}": torch.tensor(value) for name, value in numbers.items()}
        return {**numbers, **tensors, **given, "each": batch, "word": "w"}

    batches = [torch.full((n,), 0.1, dtype=torch.float64) for n in (1, 2, 5)]
    scores = lk.evaluate(step, tiny_state(), batches)
    assert scores["int"] == (1 * 1 + 2 * 2 + 5 * 5) / 8
    assert scores["bool"] == 7 / 8
    assert scores["float"] == pytest.approx(0.1 * 30 / 8, rel=1e-15)
    assert all(scores[f"tensor/{n}"] == scores[n] for n in ("int", "bool", "numpy"))
    assert len(scores) == 8


def test_batches_over_nothing_add_nothing():
    """A weight of zero leaves the mean of the others alone, and a mean over nothing is NaN."""
    state = tiny_state()
    for convert in (int, torch.tensor):

        def step(state, weight, convert=convert):
            loss = torch.tensor(2.0 if weight else float("nan"))
            return {"loss": loss, "weight": convert(weight)}

        assert lk.evaluate(step, state, [3, 0, 1]) == {"loss": 2.0}
        assert np.isnan(lk.evaluate(step, state, [0, 0])["loss"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_in_one_batch_is_visible(bad):
    """It is neither dropped nor averaged away."""
    data = [torch.ones(4), torch.tensor([1.0, bad]), torch.ones(1)]

    def step(state, x):
        return {"loss": x.mean(), "other": x.sum() * 0}

    found = lk.evaluate(step, tiny_state(), data)
    assert found["loss"] == pytest.approx(bad, nan_ok=True)
    assert np.isnan(found["other"])


def test_a_bare_loss_will_do():
    """A step function that returns only its loss is evaluated for that."""
    data = [torch.ones(3), torch.zeros(1)]
    assert lk.evaluate(lambda state, x: x.mean(), tiny_state(), data) == {"loss": 0.75}


def test_only_the_forward_of_a_decorated_step_runs():
    """The step that trains can evaluate: under its autocast, without gradients or updates."""
    found, state = [], make_state()

    @lk.with_clip(1.0)
    @lk.with_grad_accum(4)
    @lk.with_amp("bf16")
    def step(state, batch):
        logits = state.model(batch[0])
        found.append((logits.dtype, torch.is_grad_enabled(), state.model.training))
        return F.cross_entropy(logits, batch[1])

    before = state.model[0].weight.clone()
    lk.evaluate(step, state, make_batches(2))
    assert found == [(torch.bfloat16, False, False)] * 2
    assert torch.equal(state.model[0].weight, before)
    assert state.step == 0


# Several loaders, limits, data of every kind


def test_several_loaders_are_named_and_measured_apart():
    """Each loader's results start with its name, and metrics begin anew for each."""
    state, metric = make_state("mlp", dtype=torch.float64), MulticlassAccuracy(3)
    apart = {"val": cut(9), "test": cut(11, INPUTS[:40], LABELS[:40])}
    scores = lk.evaluate(full, state, apart, {"accuracy": metric, "f1": macro_f1})
    for name, data in apart.items():
        alone = lk.evaluate(full, state, data, {"accuracy": metric, "f1": macro_f1})
        assert {k: scores[f"{name}/{k}"] for k in alone} == alone
    assert len(scores) == 2 * len(alone)


@pytest.mark.parametrize(
    ("limit", "taken"), [(None, 10), (3, 3), (0.25, 2), (0.29, 2), (1.0, 10), (50, 10), (0.01, 1)]
)
def test_a_limit_takes_the_first_batches(limit, taken):
    """A number of batches, or a fraction of a sized loader."""
    seen = []
    step = lambda state, x: seen.append(int(x[0, 0])) or x.mean()  # noqa: E731
    lk.evaluate(step, tiny_state(), numbered(10), limit_batches=limit)
    assert seen == [*range(taken)]


@pytest.mark.parametrize(
    "data",
    [loader(6), loader(6, 1), loader(6, kind=Stream), loader(6, 1, kind=SizedStream),
     Counted(numbered(6)), Counted(numbered(6), 6), tuple(numbered(6))],
    ids=["loader", "workers", "stream", "sized stream", "iterable", "sized iterable", "tuple"],
)  # fmt: skip
def test_any_iterable_is_evaluated_whole(data):
    """Every batch counts once, again at each call, and no worker is left."""
    before = children()
    for _ in range(2):
        assert lk.evaluate(lambda state, x: x.mean(), tiny_state(), data) == {"loss": 2.5}
    assert children() <= before


@pytest.mark.parametrize("data", [[], Counted([]), iter([]), {}, {"val": []}])
@pytest.mark.parametrize("limit", [None, 2])
def test_empty_data_is_an_error(data, limit):
    """Nothing to evaluate is a DataError, never an empty result."""
    with pytest.raises(lk.DataError, match=r"at least one batch"):
        lk.evaluate(lambda state, x: x.mean(), tiny_state(), data, limit_batches=limit)


def test_a_length_that_is_wrong_is_an_error():
    """Data that ends before its length, or goes on after it, is not evaluated in part."""
    step, state = (lambda state, x: x.mean()), tiny_state()
    with pytest.raises(lk.DataError, match="its end after 3 batches"):
        lk.evaluate(step, state, Counted(numbered(3), 5))
    with pytest.raises(lk.DataError, match=r"len\(data\) = 2: found more batches"):
        lk.evaluate(step, state, Counted(numbered(3), 2))
    assert lk.evaluate(step, state, Counted(numbered(3), 2), limit_batches=1) == {"loss": 0.0}


# Wrong uses


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": macro_f1}, "'loss' twice"),
        (MetricCollection({"margin": MulticlassAccuracy(3)}), "'margin' twice"),
        ({"depth": (macro_f1, "preds", "depths")}, r"no \['depths'\].*has \['count', 'inputs'"),
        ({"mean": (MeanMetric(),)}, "a tuple"),
        ({"mean": ()}, "a tuple"),
        ({"mean": 3}, "a int"),
        ({"mean": (macro_f1, 3)}, "a tuple"),
        (macro_f1, "a function"),
        ([macro_f1], "a list"),
        ("accuracy", "a str"),
    ],
)
def test_metrics_that_cannot_be_right_are_refused(metrics, message):
    """A clash of names, a missing key, or what is no metric is an error that names it."""
    with pytest.raises(lk.UsageError, match=message):
        lk.evaluate(full, make_state("mlp", dtype=torch.float64), cut(50), metrics)


def test_a_metric_without_preds_says_what_to_return():
    """An eval step that returns only a loss cannot feed a metric."""
    with pytest.raises(lk.UsageError, match=r"no \['preds', 'target'\](.|\n)*\"preds\": \.\.\."):
        lk.evaluate(classifier, make_state(), make_batches(1), MulticlassAccuracy(3))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "a NoneType"),
        (1.5, "a float"),
        (torch.ones(3), r"of shape \(3,\)"),
        ({"loss": torch.ones(2)}, r"of shape \(2,\)"),
        ({"loss": 1.0}, "a float"),
        ({"loss": torch.ones(()), "weight": -1}, "weight = -1"),
        ({"loss": torch.ones(()), "weight": float("nan")}, "weight = nan"),
    ],
)
def test_an_output_that_cannot_be_measured_is_refused(output, message):
    """What is no mapping, no 0-d loss, or no weight is an OutputError that shows it."""
    with pytest.raises(lk.OutputError, match=message):
        lk.evaluate(lambda state, x: output, tiny_state(), numbered(1))
