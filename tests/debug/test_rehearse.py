"""Rehearsals: what they find, and that nothing of the training changes by them."""

import copy

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from problems import classifier, make_batches, make_state

ACCURACY = {"accuracy": MulticlassAccuracy(3)}


def measured(state, batch):
    logits = state.model(batch[0])
    loss = torch.nn.functional.cross_entropy(logits, batch[1])
    return {"loss": loss, "preds": logits, "target": batch[1]}


def shuffled(kind=DataLoader, **options):
    """A loader of 21 samples that shuffles with a generator of its own."""
    generator = torch.Generator().manual_seed(5)
    inputs, labels = make_batches(1, size=21)[0]
    return kind(TensorDataset(inputs, labels), 4, shuffle=True, generator=generator, **options)


STEPS = {
    "plain": lambda state: lk.train_step(classifier),
    "averages": lambda state: lk.with_ema(0.9)(classifier),
    "windows": lambda state: lk.with_grad_accum(2)(classifier),
    "a schedule": lambda state: lk.with_schedule(lr=lambda n: 0.1 * 0.9**n)(classifier),
    "a torch scheduler": lambda state: lk.with_schedule(StepLR(state.optimizer, 1))(classifier),
}
TRIALS = {
    "fast_dev_run": lambda step, state, data: lk.fast_dev_run(
        step, state, data, measured, data, ACCURACY, n=3
    ),
    "overfit": lambda step, state, data: [*lk.overfit(step, state, data, 2, max_steps=5)],
    "overfit, left early": lambda step, state, data: next(lk.overfit(step, state, data, 0.5)),
    "sanity_check": lambda step, state, data: lk.sanity_check(measured, state, data),
    "find_lr": lambda step, state, data: lk.find_lr(step, state, data, n=10),
    "check": lambda step, state, data: lk.debug.check(step, state, make_batches(1)[0], updates=3),
    "find_batch_size": lambda step, state, data: lk.find_batch_size(
        step, state, lambda n: make_batches(1, size=n)[0], most=8
    ),
}


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("trial", TRIALS)
def test_the_training_that_follows_is_the_same(trial, kind, begun):
    """With a trial before it, or in its middle, a training ends with the very same bits."""
    ends = []
    for tried in (False, True):
        state, loader = make_state("dropout"), shuffled()
        step = STEPS[kind](state)
        torch.manual_seed(3)
        for _ in lk.run(step, state, loader, max_steps=4) if begun else ():
            pass  # stops within an epoch
        modes = [module.training for module in state.model.modules()]
        if tried:
            before = copy.deepcopy(state.state_dict())
            TRIALS[trial](step, state, loader)
            after = state.state_dict()
            new = {
                k: after["features"].pop(k)
                for k in after["features"].keys() - before["features"].keys()
            }
            assert_bitwise_equal(after, before, f"the state after {trial}")
            assert not new or trial == "find_batch_size"
        assert [module.training for module in state.model.modules()] == modes
        for _ in lk.run(step, state, loader, max_epochs=3):
            pass
        ends.append(copy.deepcopy(state.state_dict()))
    assert_bitwise_equal(*ends, f"the training after {trial}")


class Augmented(Dataset):
    """Samples with noise that is drawn where they are loaded."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 20 + 0.1 * torch.randn(4), index % 3


@pytest.mark.parametrize("trial", ["fast_dev_run", "overfit", "sanity_check", "find_lr"])
def test_workers_that_persist_go_on_with_their_numbers(trial):
    """The noise that they add after a trial, between two epochs, is what it would have been."""
    ends = []
    for tried in (False, True):
        state = make_state()
        torch.manual_seed(4)
        loader = DataLoader(Augmented(), 5, shuffle=True, num_workers=1, persistent_workers=True)
        for _ in lk.run(classifier, state, loader, max_epochs=1):
            pass
        if tried:
            TRIALS[trial](lk.train_step(classifier), state, loader)
        for _ in lk.run(classifier, state, loader, max_epochs=2):
            pass
        ends.append(copy.deepcopy(state.state_dict()))
    assert_bitwise_equal(*ends, f"the training after {trial}")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
@pytest.mark.parametrize("trial", ["fast_dev_run", "overfit", "sanity_check", "find_lr"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_stays_where_it_was(trial, workers):
    """Its position and the batches that it gives next are those from before the trial."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    orders = []
    for tried in (False, True):
        loader, state = shuffled(stateful, num_workers=workers), make_state()
        if tried:
            TRIALS[trial](lk.train_step(classifier), state, loader)
        orders.append([labels.tolist() for _, labels in loader])
    assert orders[0] == orders[1]


def test_a_fast_dev_run_is_the_first_updates_and_an_evaluation():
    """Its numbers are those of a run and an evaluation by hand; it prints them."""
    state, batches = make_state(), make_batches()
    found = lk.fast_dev_run(
        lk.with_clip(1.0)(classifier), state, batches, measured, batches, ACCURACY, n=2
    )
    wanted = []
    for state in lk.run(lk.with_clip(1.0)(classifier), state, batches, max_steps=2):
        wanted.append({name: float(value) for name, value in state.metrics.items()})
    assert list(found.updates) == wanted
    assert found.scores == lk.evaluate(measured, state, batches, ACCURACY, limit_batches=2)
    assert str(found).splitlines()[0] == "classifier: 2 updates"
    assert f"5 samples  loss {wanted[0]['loss']:.4g}  grad_norm" in str(found)
    assert "evaluated   loss" in str(found)


def test_a_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    """The copy knows no checkpointer, and the folder stays empty."""
    monkeypatch.chdir(tmp_path)
    state = make_state()
    with lk.Checkpointer(tmp_path / "run") as checkpoints:
        checkpoints.restore(state)
        lk.fast_dev_run(classifier, state, make_batches())
        assert checkpoints.list() == []


def test_an_error_in_the_evaluation_shows_before_the_training():
    """A mistake in the eval step is raised by the rehearsal, with the state as it was."""
    state, before = make_state(), copy.deepcopy(make_state().state_dict()["model"])
    with pytest.raises(KeyError, match="labls"):
        lk.fast_dev_run(classifier, state, make_batches(), lambda s, b: {}["labls"], make_batches())
    assert_bitwise_equal(state.state_dict()["model"], before, "the model")


def test_overfit_trains_on_the_same_few_batches():
    """Its losses are those of a plain loop over the first two batches again and again."""
    state, batches = make_state(), make_batches()
    found = [float(trial.loss) for trial in lk.overfit(classifier, state, batches, 2, max_steps=7)]
    plain = make_state()
    wanted = [float(s.loss) for s in lk.run(classifier, plain, batches[:2], max_steps=7)]
    assert found == wanted
    assert found[-2:] < found[:2]


@pytest.mark.parametrize(("batches", "count"), [(1, 1), (0.5, 3), (1.0, 6), (0.01, 1), (99, 6)])
def test_overfit_takes_a_number_or_a_fraction(batches, count):
    """Of six batches so many are seen over and over, in the order in which they came."""
    seen = []

    def step(state, batch):
        seen.append(tuple(batch[1].tolist()))
        return classifier(state, batch)

    for _ in lk.overfit(step, make_state(), make_batches(6), batches, max_steps=2 * count):
        pass
    assert seen == [tuple(labels.tolist()) for _, labels in make_batches(6)[:count]] * 2


def test_overfit_is_an_iterator_like_a_run():
    """It knows its length, ends where one breaks, and yields a copy, not the state."""
    state = make_state()
    with lk.overfit(classifier, state, make_batches(), max_steps=9) as trial:
        assert trial.total_steps == 9
        first = next(trial)
    assert first is not state
    assert (first.step, state.step) == (1, 0)
    assert [*trial] == []


def test_the_callers_random_numbers_go_on_between_the_updates_of_overfit():
    """What the loop's body draws is what it would draw without the trial."""
    torch.manual_seed(7)
    wanted = [torch.rand(1).item() for _ in range(4)]
    torch.manual_seed(7)
    state = make_state("dropout")
    torch.manual_seed(7)
    found = [
        torch.rand(1).item() for _ in lk.overfit(classifier, state, make_batches(), max_steps=4)
    ]
    assert found == wanted


def test_a_sanity_check_gives_the_scores_of_the_first_batches():
    """Over two batches, or as many as asked for; the metrics that were given stay unused."""
    state, batches = make_state(), make_batches()
    metrics = {"accuracy": MulticlassAccuracy(3)}
    metrics["accuracy"].update(torch.tensor([1]), torch.tensor([1]))
    wanted = lk.evaluate(measured, state, batches[:2], {"accuracy": MulticlassAccuracy(3)})
    assert lk.sanity_check(measured, state, batches, metrics=metrics) == wanted
    named = lk.sanity_check(measured, state, {"a": batches, "b": batches}, 1)
    assert set(named) == {"a/loss", "b/loss"}
    assert metrics["accuracy"].compute() == 1


U, D = lk.UsageError, lk.DataError
WRONG = {
    "no batches": (lambda s: lk.fast_dev_run(classifier, s, make_batches(), n=0), U, "n = 0", "1 or more"),
    "a bool": (lambda s: lk.sanity_check(measured, s, make_batches(), True), U, "bool", "an int"),
    "an eval step without data": (
        lambda s: lk.fast_dev_run(classifier, s, make_batches(), measured), U, "without eval_data", "both",
    ),
    "an iterator": (
        lambda s: lk.fast_dev_run(classifier, s, iter(make_batches())), D, "lose the batches", "anew",
    ),
    "an iterator to evaluate": (
        lambda s: lk.sanity_check(measured, s, {"a": iter(make_batches())}), D, "lose the batches", "anew",
    ),
    "no optimizer": (
        lambda s: lk.overfit(classifier, lk.TrainState(s.model), make_batches()), U, "no optimizer", "TrainState(model, optimizer)",
    ),
    "no state": (lambda s: lk.overfit(classifier, s.model, make_batches()), U, "Sequential", "TrainState"),
    "a fraction above one": (
        lambda s: lk.overfit(classifier, s, make_batches(), 1.5), U, "1.5", "a fraction in (0, 1]",
    ),
    "a fraction of zero": (
        lambda s: lk.overfit(classifier, s, make_batches(), 0.0), U, "0.0", "a fraction in (0, 1]",
    ),
    "no batch": (lambda s: lk.overfit(classifier, s, make_batches(), 0), U, "= 0", "1 or more"),
    "empty data": (lambda s: lk.overfit(classifier, s, []), D, "no batch", "at least one"),
    "no updates": (
        lambda s: lk.overfit(classifier, s, make_batches(), max_steps=0), U, "max_steps = 0", "1 or more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Numbers, data and states that cannot be right say what was found and what to write."""
    wrong, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        wrong(make_state())
    assert found in caught.value.wrote + " " + caught.value.found
    assert remedy in caught.value.instead
