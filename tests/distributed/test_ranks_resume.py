"""What several ranks save, any number of them goes on from."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from pool import POOL
from test_parity import Blocks, whole
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STRATEGIES = {"ddp": (2, "ddp"), "fsdp": (2, "fsdp"), "zero1": (2, "zero1"), "one": (1, "ddp")}


def dropout_classifier(state, batch):
    inputs, labels = batch
    state.extras["seen"] += labels.tolist()
    hidden = nn.functional.dropout(inputs, 0.2, training=state.model.training)
    return state.model(hidden).square().mean()


def fresh():
    torch.manual_seed(0)
    model = Blocks()
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01), seen=[])


def loader():
    inputs = torch.randn(52, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(inputs, torch.arange(52)), 3, shuffle=True)


def decorated(strategy):
    return lk.compose(
        lk.with_ema(0.9), lk.with_clip(0.5), lk.with_grad_accum(2), lk.distributed(strategy)
    )(dropout_classifier)


def trained(strategy, folder, stop, restore_first=True):
    """Restore, train to `stop` updates, save; weights, averages and the labels seen."""
    step, state = decorated(strategy), fresh()
    checkpoints = lk.Checkpointer(folder) if folder else None
    if restore_first and checkpoints is not None:
        checkpoints.restore(state)
    step.set_up(state)
    if not restore_first:
        checkpoints.restore(state)
    [*lk.run(step, state, loader(), max_steps=stop)]
    if checkpoints is not None:
        checkpoints.save(state)
        checkpoints.close()
    return whole(state.model.state_dict()), whole(state.features["ema"].weights), state.extras


@pytest.mark.parametrize("restore_first", [True, False], ids=["before", "after set-up"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_going_on_in_the_midst_of_an_epoch_changes_no_bit(strategy, restore_first, tmp_path):
    """Two ranks cut twice, with dropout and shuffling, end with the weights of those uncut."""
    world, name = STRATEGIES[strategy]
    straight = POOL.run(world, trained, name, None, 7)
    for stop in (2, 4, 7):
        found = POOL.run(world, trained, name, str(tmp_path), stop, restore_first)
    for (weights, averages, _), (expected, expected_averages, _) in zip(
        found, straight, strict=True
    ):
        assert_bitwise_equal(weights, expected)
        assert_bitwise_equal(averages, expected_averages)


def counted(found):
    return sorted(label for _, _, extras in found for label in extras["seen"])


def test_ranks_may_change_within_an_epoch(tmp_path):
    """2, 1, 4, then 2 ranks, of other strategies: each sample of the epoch is seen once."""
    plan = [("fsdp", 2, 2), ("ddp", 1, 3), ("zero1", 4, 4), ("fsdp", 2, None)]
    weights = None
    seen = []
    for strategy, world, stop in plan:
        found = POOL.run(world, elastic, strategy, str(tmp_path), stop, weights)
        weights = found[0][0]
        seen += [label for _, labels in found for label in labels]
    assert sorted(seen) == [*range(52)]


def elastic(strategy, folder, stop, expected):
    """The same, of each rank's own samples; with a check that the weights are as they were."""
    step, state = decorated(strategy), fresh()
    checkpoints = lk.Checkpointer(folder)
    restored = checkpoints.restore(state)
    assert restored == (expected is not None)
    step.set_up(state)
    if expected is not None:
        assert_bitwise_equal(whole(state.model.state_dict()), expected)
    state.extras["seen"].clear()
    limits = {"max_epochs": 1} if stop is None else {"max_steps": stop}
    taken = []
    for state in lk.run(step, state, loader(), **limits):
        fillers = len(state.extras["seen"]) - state_samples(state, taken)
        own = state.extras["seen"][: len(state.extras["seen"]) - fillers]
        state.extras["seen"].clear()
        taken += own
    checkpoints.save(state)
    checkpoints.close()
    return whole(state.model.state_dict()), taken


def state_samples(state, taken):
    return state.outcome.samples


def samples(count):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))
    return TensorDataset(inputs, torch.arange(count) % 3)


def looked_at(state, batch_size, count, names):
    data = DataLoader(samples(count), batch_size)
    measured = {name: metric for name, metric in metrics().items() if name in names}
    scores = lk.evaluate(eval_step, state, data, measured)
    return scores, lk.collect(lk.predict(lambda s, b: s.model(b[0]), state, data))


def evaluated(strategy, cases):
    step, state = decorated(strategy), fresh()
    step.set_up(state)
    return {case: looked_at(state, *case) for case in cases}


def eval_step(state, batch):
    inputs, labels = batch
    logits = state.model(inputs)
    loss = nn.functional.cross_entropy(logits, labels)
    return {"loss": loss, "preds": logits, "target": labels, "one": torch.tensor(1.0)}


def metrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

    return {
        "accuracy": MulticlassAccuracy(3),
        "auroc": MulticlassAUROC(3),
        "top": lambda preds, target: float((preds.argmax(1) == target).double().mean()),
        "count": lambda preds, target: len(target),
    }


WHOLE = ("accuracy", "auroc", "top", "count")
CASES = {
    101: [(batch_size, 101, WHOLE) for batch_size in (1, 4, 32)],
    50: [(3, count, ("accuracy", "count")) for count in range(1, 51)],
    4: [(1, count, ("accuracy", "count")) for count in range(1, 5)],
}


@pytest.mark.parametrize(
    ("strategy", "world", "most"),
    [
        ("ddp", 2, 101), ("ddp", 3, 101), ("fsdp", 2, 101), ("fsdp", 4, 101),
        ("ddp", 2, 50), ("ddp", 3, 50), ("fsdp", 4, 4),
    ],
)  # fmt: skip
def test_evaluation_does_not_depend_on_ranks(strategy, world, most):
    """Of any number of samples, in batches of any size, also fewer than ranks: all on every rank.

    Loss, metrics and predictions are those of one process, and each sample counts once.
    """
    state = fresh()
    found = POOL.run(world, evaluated, strategy, CASES[most])
    for case in CASES[most]:
        expected, predicted = looked_at(state, *case)
        assert expected["count"] == case[1]
        for ranks in found:
            scores, outputs = ranks[case]
            assert scores == pytest.approx(expected, rel=1e-6)
            assert scores["one"] == 1.0
            torch.testing.assert_close(outputs, predicted)


def went_on(kind):
    """A run over a list, an evaluation in the midst of an epoch, and the run again."""
    step, state = lk.distributed()(lambda state, batch: state.model(batch).mean()), fresh()
    data = [torch.full((1, 4), float(i)) for i in range(12)]
    data = {"list": data, "loader": DataLoader(torch.randn(12, 4))}[kind]
    for state in lk.run(step, state, data):
        if state.step == 2:
            break
    lk.evaluate(lambda state, batch: {"loss": batch.mean()}, state, [torch.ones(1)] * 3)
    [*lk.run(step, state, data, max_epochs=1)]
    return state.step, float(torch.rand(()))


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_an_evaluation_between_two_runs_does_not_begin_the_epoch_anew(kind):
    """Six updates of two ranks are an epoch of twelve batches; and ranks draw numbers apart."""
    (first, drawn), (second, other) = POOL.run(2, went_on, kind)
    assert (first, second) == (6, 6)
    assert drawn != other


def branched():
    step, state = lk.distributed("fsdp")(dropout_classifier), fresh()
    step.set_up(state)
    with pytest.raises(lk.CompositionError, match="each rank holds a part"):
        state.snapshot()


def test_a_state_that_is_spread_is_not_copied():
    """A snapshot of shards is an error that says what to do."""
    POOL.run(2, branched)


def branched_later(folder):
    """A restore, an update, and a branch that another step is set up on."""
    step, other, state = decorated("ddp"), decorated("ddp"), fresh()
    lk.Checkpointer(folder).restore(state)
    next(lk.run(step, state, loader(), max_epochs=1))
    branch = state.snapshot()
    drawn, samples, position = torch.get_rng_state(), branch.samples, branch.position
    other.set_up(branch)
    if state.ranks.is_first:  # others are seeded apart
        assert torch.equal(torch.get_rng_state(), drawn)
    assert branch.samples == samples > 0
    assert branch.position is position


def test_a_branch_of_a_restored_run_begins_where_the_run_is(tmp_path):
    """What was restored long ago is not gone back to when a branch is spread over ranks."""
    POOL.run(2, trained, "ddp", str(tmp_path), 2)
    POOL.run(2, branched_later, str(tmp_path))
