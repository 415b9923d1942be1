"""A run that was saved and restored is the run that was not: bit for bit."""

import random

import loopkit as lk
import numpy as np
import pytest
import torch
from torch import nn

from trainings import STEPS, digest, digest_of, make_batches, make_state, restored, train


@pytest.mark.parametrize("cut", [0, 3, 7, 9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("step", STEPS)
def test_a_resumed_run_equals_the_whole_one(tmp_path, step, optimizer, cut):
    """Saved at the start, within an epoch, at its end, and after; and then once more."""
    total = 14
    if step == "all":
        batches = make_batches(8)  # four updates of two
        total, cut = 8, min(cut, 6)
    else:
        batches = make_batches(7)
    whole = digest_of(train(make_state(optimizer), total, step, batches))

    state = train(make_state(optimizer), cut, step, batches) if cut else make_state(optimizer)
    for then in (1, total - cut - 1):
        with lk.Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(state)
        state = make_state(optimizer, seed=5)
        torch.rand(3), np.random.rand(3), random.random()
        assert lk.Checkpointer(tmp_path).restore(state)
        train(state, then, step, batches)
    assert digest_of(state) == whole


def test_a_skipped_update_of_fp16_survives(tmp_path):
    """The loss scale that an overflow halved, and the counts that stood still, go on."""
    step = STEPS["fp16"]
    batches = [
        (inputs * (1e30 if i == 2 else 1), labels)
        for i, (inputs, labels) in enumerate(make_batches())
    ]

    def run_on(state, upto):
        for _ in lk.run(step, state, batches, max_steps=upto):
            pass
        return state

    whole = digest_of(run_on(make_state(), 6))
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(run_on(make_state(), 3))
    state = make_state(seed=7)
    lk.Checkpointer(tmp_path).restore(state)
    assert digest_of(run_on(state, 6)) == whole


def test_a_save_within_averages_holds_the_own_weights(tmp_path):
    """Inside `with ema_weights` a checkpoint has the model's weights, tied ones under each name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(state, 3, "ema")
    own = digest(state.state_dict()["model"])
    with lk.ema_weights(state), lk.Checkpointer(tmp_path) as checkpoints:
        assert digest(dict(state.model.state_dict())) != own
        checkpoints.save(state)
        with pytest.raises(lk.CompositionError, match="after the with block"):
            checkpoints.restore(state)
    assert digest(state.state_dict()["model"]) == own
    lk.Checkpointer(tmp_path).restore(state)
    assert digest(state.state_dict()["model"]) == own
    assert model[1].weight is model[0].weight


def test_extras_are_restored_whatever_they_are(tmp_path):
    """A second model, a torch metric's state, and plain data of every kind."""

    def make():
        return make_state(
            other=nn.Linear(2, 2), seen={1: (2, None)}, scale=torch.tensor(3.0), ids={1}
        )

    state = make()
    state.extras["seen"][5] = (6, [7.5])
    state.extras["new"] = "text"
    state.extras["ids"].add("a")
    nn.init.ones_(state.extras["other"].weight)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    back = make()
    lk.Checkpointer(tmp_path).restore(back)
    assert digest_of(back) == digest_of(state)
    assert back.extras["seen"] == {1: (2, None), 5: (6, [7.5])}
    assert isinstance(back.extras["other"], nn.Linear)


def test_the_best_is_loaded_at_the_end(tmp_path):
    """load_best brings back the state with the best score, all of it."""
    state, digests = make_state(), []
    checkpoints = lk.Checkpointer(tmp_path, monitor="accuracy", mode="max")
    for accuracy in [0.1, 0.9, 0.5]:
        train(state, 1)
        digests.append(digest_of(state))
        checkpoints.save(state, {"accuracy": torch.tensor(accuracy)})
    checkpoints.close()
    lk.load_best(state)
    assert digest_of(state) == digests[1]
    assert restored(tmp_path, "best", monitor="accuracy", mode="max") == digests[1]


def test_load_best_needs_something_to_load(tmp_path):
    """A state that was never saved, a folder without checkpoints, one without scores."""
    with pytest.raises(lk.CheckpointError, match="no Checkpointer"):
        lk.load_best(make_state())
    state = make_state()
    with lk.Checkpointer(tmp_path, monitor="loss") as checkpoints:
        with pytest.raises(lk.CheckpointError, match="no checkpoint in"):
            checkpoints.load_best(state)
        checkpoints.save(state)
        with pytest.raises(lk.CheckpointError, match="monitor='loss'"):
            lk.load_best(state)
    with pytest.raises(lk.UsageError, match="by which score"):
        lk.Checkpointer(tmp_path).restore(state, "best")


def test_which_may_be_a_checkpoint_its_path_or_its_name(tmp_path):
    """One of the list, its folder, and the name of that."""
    state = make_state()
    with lk.Checkpointer(tmp_path, async_save=False) as checkpoints:
        for _ in range(2):
            state.step += 1
            checkpoints.save(state)
        for which in (checkpoints.list()[0], checkpoints.list()[0].path, "step-000000000001",
                      str(tmp_path / "step-000000000001")):  # fmt: skip
            assert checkpoints.restore(state, which)
            assert state.step == 1
        with pytest.raises(lk.CheckpointError, match="no such folder"):
            checkpoints.restore(state, "step-000000000005")


def test_a_state_to_evaluate_takes_the_model(tmp_path):
    """Without an optimizer a state can be restored as well."""
    state = train(make_state(), 2, "ema")
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    other = lk.TrainState(make_state(seed=3).model)
    assert lk.Checkpointer(tmp_path).restore(other)
    assert digest(other.state_dict()["model"]) == digest(state.state_dict()["model"])


def fail(*arguments, **settings):
    raise RuntimeError("not today")


def other_optimizer(state):
    return lk.TrainState(state.model, torch.optim.SGD(state.model.parameters(), lr=0.1))


def other_order(state):
    return lk.TrainState(state.model, torch.optim.AdamW([*state.model.parameters()][::-1], lr=0.1))


def other_groups(state):
    groups = [{"params": [p]} for p in state.model.parameters()]
    return lk.TrainState(state.model, torch.optim.AdamW(groups, lr=0.1))


def other_shape(state):
    model = nn.Sequential(*[*state.model][:4], nn.Linear(6, 5))
    return lk.TrainState(model, torch.optim.AdamW(model.parameters()))


def other_names(state):
    model = nn.Sequential(state.model)
    return lk.TrainState(model, torch.optim.AdamW(model.parameters()))


def other_features(state):
    return train(state, 1, "schedule")


def other_extras(state):
    return lk.TrainState(state.model, state.optimizer, more=nn.Linear(1, 1))


def failing_extras(state):
    state.extras["other"].load_state_dict = fail
    return state


MISFITS = {
    "another optimizer": (other_optimizer, "optimizer: AdamW in the checkpoint, SGD in the state"),
    "another order of parameters": (other_order, "in another order"),
    "other groups": (other_groups, "groups of [6] parameters in the checkpoint, [1, 1, 1"),
    "another shape": (
        other_shape,
        "4.weight of shape (3, 6) in the checkpoint, (5, 6) in the state",
    ),
    "other names": (other_names, "0.0.weight, 0.0.bias"),
    "other features": (other_features, "features.ema: in the checkpoint, not in the state"),
    "an extra more": (other_extras, "extras.more: in the state, not in the checkpoint"),
    "an extra less": (other_extras, "extras.other: in the checkpoint, not in the state"),
    "an extra that fails": (failing_extras, "not today"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_cannot_work_is_refused_and_changes_nothing(tmp_path, case):
    """The difference is named with its remedy, and the state is as it was, random numbers too."""
    change, found = MISFITS[case]
    state = train(make_state(other=nn.Linear(2, 2)), 2, "ema")
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    other = change(make_state(seed=4, other=nn.Linear(2, 2)))
    other.extras.setdefault("other", nn.Linear(2, 2)) if case == "an extra more" else None
    before = digest_of(other)
    with pytest.raises(lk.CheckpointError) as caught:
        lk.Checkpointer(tmp_path).restore(other)
    assert found in caught.value.found
    assert digest_of(other) == before
    assert other.extras.keys() <= {"other", "more"}


def test_settings_that_the_checkpoint_changes_are_shown(tmp_path):
    """A learning rate and a dtype that differ are taken from the checkpoint, and listed."""
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(make_state())
    state = make_state()
    state.optimizer.param_groups[0]["lr"] = 0.5
    state.model.double()
    checkpoints.restore(state)
    changes = "\n".join(checkpoints.restored.changes)
    assert "optimizer: lr of group 0 from 0.5 to 0.01" in changes
    assert "model: 0.weight from torch.float32 to torch.float64" in changes


class Versioned(nn.Module):
    """Keeps a dict beside its tensors."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(1, 1), {}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def test_a_models_extra_state_is_saved(tmp_path):
    """What get_extra_state gives is part of the model, if it is plain data."""
    model = Versioned()
    model.seen = {1: ("a", torch.ones(2))}
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(lk.TrainState(model))
    other = Versioned()
    checkpoints.restore(lk.TrainState(other))
    assert digest(other.seen) == digest(model.seen)


OPTIMIZERS = [
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop,
    torch.optim.SGD, torch.optim.Adafactor, torch.optim.LBFGS,
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
def test_every_optimizer_of_torch_goes_on(tmp_path, optimizer):
    """Whatever an optimizer keeps is plain data, and comes back exactly."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return lk.TrainState(model, optimizer(model.parameters(), lr=0.01))

    step = lk.train_step(lambda s, b: nn.functional.cross_entropy(s.model(b[0]), b[1]))
    if optimizer is torch.optim.LBFGS:
        step = lk.with_closure()(step.function)
    state = make()
    for batch in make_batches(3):
        step(state, batch)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    back = make()
    checkpoints.restore(back)
    for batch in make_batches(3):
        step(state, batch)
        step(back, batch)
    assert digest_of(back) == digest_of(state)


S = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 2, 5]),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda n: 0.9**n),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 9),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, total_iters=2), S.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)], o),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_of_torch_goes_on(tmp_path, scheduler):
    """Whatever a scheduler keeps is plain data, and comes back exactly."""
    step = lk.with_schedule(SCHEDULERS[scheduler])(STEPS["plain"].function)
    state = make_state("sgd")
    for batch in make_batches(4):
        step(state, batch)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        saved = digest_of(state)
        for batch in make_batches(4):
            step(state, batch)
        whole, back = digest_of(state), make_state("sgd", seed=3)
        checkpoints.restore(back)
    assert digest_of(back) == saved
    for batch in make_batches(4):
        step(back, batch)
    assert digest_of(back) == whole
