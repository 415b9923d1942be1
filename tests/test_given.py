"""A wrong thing in a state's, a model's or the data's place: told by the function it is given to."""

import io

import loopkit as lk
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from problems import classifier, make_batches, make_state

MODEL, BATCHES = make_state().model, make_batches()
DATASET = TensorDataset(*BATCHES[0])
STATES = {
    "predict": lambda wrong, path: lk.predict(classifier, wrong, BATCHES),
    "evaluate": lambda wrong, path: lk.evaluate(classifier, wrong, BATCHES),
    "run": lambda wrong, path: lk.run(classifier, wrong, BATCHES),
    "learning_rates": lambda wrong, path: lk.learning_rates(wrong),
    "device_stats": lambda wrong, path: lk.device_stats(wrong),
    "ema_weights": lambda wrong, path: lk.ema_weights(wrong),
    "update_bn": lambda wrong, path: lk.update_bn(classifier, wrong, BATCHES),
    "load_best": lambda wrong, path: lk.load_best(wrong),
    "checkpoints.save": lambda wrong, path: lk.Checkpointer(path).save(wrong),
    "checkpoints.restore": lambda wrong, path: lk.Checkpointer(path).restore(wrong),
    "log": lambda wrong, path: lk.Log(path)(wrong),
    "sanity_check": lambda wrong, path: lk.sanity_check(classifier, wrong, BATCHES),
    "find_lr": lambda wrong, path: lk.find_lr(classifier, wrong, BATCHES),
    "overfit": lambda wrong, path: lk.overfit(classifier, wrong, BATCHES),
}
DATA = {
    "run": lambda wrong: lk.run(classifier, make_state(), wrong),
    "evaluate": lambda wrong: lk.evaluate(classifier, make_state(), wrong),
    "evaluate, named": lambda wrong: lk.evaluate(classifier, make_state(), {"val": wrong}),
    "predict": lambda wrong: lk.predict(classifier, make_state(), wrong),
}
OTHERS = {
    "a generator of parameters to configure_optimizer": (
        lambda path: lk.configure_optimizer(MODEL.parameters(), "adamw", lr=1.0, weight_decay=0.1),
        "a model of type generator", "torch.nn.Module",
    ),
    "a state to param_groups": (
        lambda path: lk.param_groups(make_state(), {"bias": {}}), "TrainState", "torch.nn.Module"
    ),
    "rules in a list": (lambda path: lk.param_groups(MODEL, ["bias"]), "of type list", "a mapping"),
    "a state dict to export": (
        lambda path: lk.export(MODEL.state_dict(), path / "x.safetensors"), "OrderedDict", "a model first"
    ),
    "the path first to export": (lambda path: lk.export("x.safetensors", MODEL), "a str", "path second"),
    "a state to load_weights": (
        lambda path: lk.load_weights(make_state(), path), "TrainState", "torch.nn.Module"
    ),
    "a loader to summary": (
        lambda path: lk.summary(MODEL, DataLoader(DATASET)), "gives batches", "next(iter(loader))"
    ),
    "a loader to find_batch_size": (
        lambda path: lk.find_batch_size(classifier, make_state(), DataLoader(DATASET)),
        "a DataLoader as make_batch", "lambda n:",
    ),
    "no batch to check": (
        lambda path: lk.debug.check(classifier, make_state(), None), "NoneType", "next(iter(loader))"
    ),
    "a number as a schedule to draw": (
        lambda path: lk.plot_schedule(3, path / "lr.png"), "3", "by name"
    ),
    "scores without names in a log": (
        lambda path: lk.Log(path)(make_state(), {"loss": 1.0}), "a dict without a name", "**scores"
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", STATES)
@pytest.mark.parametrize("wrong", [MODEL, None], ids=["model", "None"])
def test_what_is_no_state(where, wrong, tmp_path):
    """The error says that it is in the state's place, and what belongs there."""
    with pytest.raises(lk.UsageError) as caught:
        STATES[where](wrong, tmp_path)
    assert type(wrong).__name__ in caught.value.found
    assert "state" in caught.value.instead.lower()


@pytest.mark.parametrize("where", DATA)
@pytest.mark.parametrize("wrong", [MODEL, None, 3, DATASET], ids=["model", "None", "3", "dataset"])
def test_what_gives_no_batches(where, wrong):
    """No data, a model, and a dataset whose items are single samples."""
    with pytest.raises(lk.UsageError, match=f"a {type(wrong).__name__}.* as the data") as caught:
        DATA[where](wrong)
    assert "loader" in caught.value.instead


def test_what_gives_batches_is_taken():
    """Lists, generators, streams, loaders without batches of their own, what has only an index."""

    class Indexed:
        def __getitem__(self, index):
            return BATCHES[index]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(BATCHES)

    for data in (BATCHES, iter(BATCHES), Stream(), Indexed(), DataLoader(BATCHES, batch_size=None)):
        shown = lk.progress(
            lk.run(classifier, make_state(), data, max_epochs=1), file=io.StringIO()
        )
        assert shown.finish().step == len(BATCHES)


@pytest.mark.parametrize("case", OTHERS)
def test_other_things_in_the_wrong_place(case, tmp_path):
    """Each says what it found, and what to write."""
    wrong, found, instead = OTHERS[case]
    with pytest.raises(lk.UsageError) as caught:
        wrong(tmp_path)
    assert found in caught.value.found
    assert instead in caught.value.instead
