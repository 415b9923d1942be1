"""What a review of training on several ranks found, so that it stays mended."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from test_parity import Blocks, fresh, whole
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassConfusionMatrix

from pool import POOL


def masked_mean(state, batch):
    """A mean over what a mask says, which is 0/0 where it says nothing."""
    inputs, mask = batch
    losses = state.model(inputs).square().mean(1)
    return {"loss": (losses * mask).sum() / mask.sum(), "weight": mask.sum()}


def empty_on_one(strategy):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    step, state = lk.distributed(strategy)(masked_mean), fresh()
    step.set_up(state)
    rank = state.ranks.rank
    inputs = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 12
    mask = torch.zeros(3, dtype=torch.float64) if rank else torch.tensor([1.0, 0, 1]).double()
    step(state, (inputs, mask))
    return whole(state.model.state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_with_a_mean_over_nothing_poisons_nobody(strategy):
    """Its loss is 0/0, its weight 0: the weights are those of the other rank's batch alone."""
    state = fresh()
    inputs = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 12
    lk.train_step(masked_mean)(state, (inputs, torch.tensor([1.0, 0, 1]).double()))
    for weights in POOL.run(2, empty_on_one, strategy):
        for name, value in state.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-11)


def with_lbfgs():
    torch.manual_seed(0)
    model = Blocks().double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, line_search_fn="strong_wolfe")
    step = lk.compose(lk.with_closure(), lk.distributed())(
        lambda state, batch: state.model(batch).square().mean()
    )
    state = lk.TrainState(model, optimizer)
    data = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lk.run(step, state, DataLoader(data, 2), max_epochs=2).finish()
    return whole(model.state_dict())


def test_a_line_search_takes_the_same_way_on_all_ranks():
    """LBFGS branches on the loss, so it is that of all ranks: replicas stay equal."""
    first, second = POOL.run(2, with_lbfgs)
    for name, value in first.items():
        assert torch.equal(value, second[name])


def counted_alone():
    step, state = lk.distributed()(lambda state, batch: state.model(batch[0]).mean()), fresh()
    step.set_up(state)
    other = fresh()  # of no strategy, as it is restored for a test after training
    inputs, labels = torch.randn(4, 4).double(), torch.tensor([0, 1, 2, 0])
    data = DataLoader(TensorDataset(inputs, labels), 2)
    scores = lk.evaluate(
        lambda s, b: {"preds": s.model(b[0]), "target": b[1]}, other, data,
        {"m": MulticlassConfusionMatrix(3)},
    )  # fmt: skip
    return sum(scores.values())


def test_a_state_of_one_process_is_measured_by_itself():
    """Torchmetrics does not add up what every rank has seen whole."""
    assert POOL.run(2, counted_alone) == [4.0, 4.0]


def refused():
    step, state = lk.distributed(stream="sharded")(lambda s, b: s.model(b).mean()), fresh()
    step.set_up(state)
    assert [*lk.predict(lambda s, b: b, state, [0, 1, 2])] == [0, 1, 2]
    data = TensorDataset(torch.arange(5.0))
    dealt = DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=False))
    with pytest.raises(lk.DataError, match="some twice"):
        lk.evaluate(lambda s, b: {"loss": b[0].mean()}, state, dealt)
    with pytest.raises(lk.DataError):
        [*lk.predict(lambda s, b: b, state, dealt)]
    with pytest.raises(lk.UsageError, match="on every rank"):
        state.skip_if(True)


def test_what_would_be_wrong_on_several_ranks_is_refused():
    """A padded sampler, a vote of one rank's own; a list is dealt out beside a sharded stream."""
    POOL.run(2, refused)


class Stateful(IterableDataset):
    """A stream of a rank's own numbers that knows where it is."""

    def __init__(self, rank):
        self.rank, self.at = rank, 0

    def __iter__(self):
        while self.at < 6:
            self.at += 1
            yield torch.full((1, 4), 100.0 * self.rank + self.at, dtype=torch.float64)

    def state_dict(self):
        return {"at": self.at, "rank": self.rank}

    def load_state_dict(self, state_dict):
        self.at, self.rank = state_dict["at"], state_dict["rank"]


def streamed(folder, stop):
    seen = []

    def step(state, batch):
        seen.append(float(batch[0, 0]))
        return state.model(batch).mean()

    lifted, state = lk.distributed(stream="sharded")(step), fresh()
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.restore(state)
        lifted.set_up(state)
        lk.run(lifted, state, Stateful(state.ranks.rank), max_steps=stop).finish()
        checkpoints.save(state)
    return seen


def test_each_rank_goes_on_in_a_stream_of_its_own(tmp_path):
    """The loader's state is saved for each rank: rank 1 does not go on with rank 0's."""
    begun = POOL.run(2, streamed, str(tmp_path), 2)
    rest = POOL.run(2, streamed, str(tmp_path), 4)
    assert [a + b for a, b in zip(begun, rest, strict=True)] == [
        [1.0, 2.0, 3.0, 4.0],
        [101.0, 102.0, 103.0, 104.0],
    ]


class Running(nn.Module):
    """Statistics that each rank keeps of its own batches."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.norm(inputs))


def buffers_of(state):
    return {name: buffer.clone() for name, buffer in state.model.named_buffers()}


def with_statistics(strategy, data):
    """Buffers before and after looking at a state in several ways, and what that gave."""
    torch.manual_seed(0)
    model = Running()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = lk.distributed(strategy)(lambda s, b: s.model(b[0]).square().mean())
    run = iter(lk.run(step, state, data, max_epochs=1))
    state = next(run)
    mine, seen = buffers_of(state), []

    def forward(s, b):
        seen.append(s.model.norm.running_mean.clone())
        return {"loss": s.model(b[0]).square().mean()}

    scores = [lk.evaluate(forward, state, data) for _ in range(2)]
    assert_bitwise_equal(buffers_of(state), mine)
    for _ in lk.predict(forward, state, data):
        assert_bitwise_equal(buffers_of(state), mine)
        break
    for index, _ in enumerate(lk.predict(forward, state, data)):
        if index == 0:
            next(run)  # the statistics are others now, for what is predicted next
    return mine, scores, seen


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_looking_at_a_state_leaves_each_rank_its_buffers(strategy):
    """Evaluations and predictions run with rank 0's, of that moment; then each has its own."""
    data = [(torch.randn(5, 4) + i,) for i in range(8)]
    (mine, scores, seen), (others, also, too) = POOL.run(2, with_statistics, strategy, data)
    assert not torch.equal(mine["norm.running_mean"], others["norm.running_mean"])
    assert scores == also
    assert scores[0] == scores[1]
    assert_bitwise_equal(seen, too)
    assert torch.equal(seen[0], mine["norm.running_mean"])
    assert not torch.equal(seen[-1], seen[0])


def drawn_by_groups():
    torch.seed()
    step = lk.distributed(lk.TensorParallel({}))(lambda state, batch: state.model(batch).mean())
    state = fresh()
    step.set_up(state)
    return float(torch.rand(()))


def test_tensor_parallel_ranks_draw_alike():
    """However the processes were seeded, those of one group take the same batches."""
    first, second = POOL.run(2, drawn_by_groups)
    assert first == second


def metric_fails():
    step, state = lk.distributed()(lambda state, batch: state.model(batch[0]).mean()), fresh()
    step.set_up(state)

    def broken(preds, target):
        raise ValueError("only one class")

    data = [(torch.ones(1, 4).double(), torch.tensor([0]))] * 4
    eval_step = lambda s, b: {"preds": s.model(b[0]), "target": b[1]}  # noqa: E731
    with pytest.raises((ValueError, lk.RankError), match="only one class"):
        lk.evaluate(eval_step, state, data, {"auc": broken})
    return lk.reduce({"rank": state.ranks.rank})["rank"]


def test_a_metric_that_fails_fails_on_all_ranks():
    """The ranks stay in step, so what follows the caught error is right on both."""
    assert POOL.run(2, metric_fails) == [0.5, 0.5]


def test_the_leaves_of_a_silenced_loss_get_zeros():
    """Tied and nested parameters too, and afterwards gradients are as always."""
    from loopkit.silence import silenced

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    loss = model(torch.zeros(3, 2)).sum() / 0.0
    with silenced(loss):
        loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    assert any((p.grad != 0).any() for p in model.parameters())
