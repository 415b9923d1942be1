"""What strategies promise beside weights: traffic, precision, optimizers, orders, what is asked."""

import functools
import itertools

import loopkit as lk
import pytest
import torch
import torch.distributed as dist
from loopkit.testing import assert_bitwise_equal, train_by_hand
from test_parity import Switched, batches, classifier, close, fresh, switched, whole
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pool import POOL
from problems import halving


class Counted:
    """The buckets that travel, by a hook of the user's own."""

    def __init__(self):
        self.times = 0

    def hook(self, group, bucket):
        self.times += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


class Scattered(TorchDispatchMode):
    """How often gradients are summed up into shards."""

    times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += "reduce_scatter" in str(function)
        return function(*args, **(kwargs or {}))


def traffic():
    """For windows of 1 and 4 micro-batches: how often gradients travelled in three updates."""
    found = {}
    for kind, size in itertools.product(("ddp", "fsdp", "fsdp, syncing each time"), (1, 4)):
        counted = Counted()
        sharded = lk.FSDP(sync_every="each" in kind)
        strategy = sharded if "fsdp" in kind else lk.DDP(comm_hook=counted.hook)
        layers = [lk.with_grad_accum(size)] * (size > 1)
        step, state = lk.compose(*layers, lk.distributed(strategy))(classifier), fresh()
        with Scattered() as scattered:
            lk.run(step, state, batches(3 * 2 * size), max_epochs=1).finish()
        found[kind, size] = state.step, (scattered if "fsdp" in kind else counted).times
    return found


def test_gradients_travel_once_for_each_update():
    """Micro-batches before a window's last send nothing, unless that was asked for."""
    for found in POOL.run(2, traffic):
        assert {steps for steps, _ in found.values()} == {3}
        times = {key: times for key, (_, times) in found.items()}
        assert times["ddp", 1] == times["ddp", 4] == 3  # one bucket
        assert times["fsdp", 1] == times["fsdp", 4] == 3 * 3  # two blocks, and the rest
        assert times["fsdp, syncing each time", 4] == 4 * times["fsdp, syncing each time", 1]


def of_precision(data):
    found = {}
    settings = {"float32": {}, "bf16": {"precision": "bf16"}, "offloaded": {"cpu_offload": True}}
    for name, setting in settings.items():
        state, seen = fresh(torch.optim.SGD), []

        def step(state, batch, seen=seen):
            logits = state.model(batch[0])
            seen.append(logits.dtype)
            return torch.nn.functional.cross_entropy(logits.float(), batch[1])

        state.model.to(torch.float32)
        lk.run(lk.distributed(lk.FSDP(**setting))(step), state, data, max_epochs=1).finish()
        assert all(isinstance(p, DTensor) for p in state.model.parameters())
        found[name] = whole(state.model.state_dict()), {*seen}, state.device
    return found


def test_fsdp_computes_in_the_precision_that_it_is_told():
    """In bf16 the weights stay float32, and near those of float32; offloaded they are the same."""
    data = [(inputs.float(), labels) for inputs, labels in batches(12)]
    for found in POOL.run(2, of_precision, data):
        (exact, _, _), (near, dtypes, _), (offloaded, _, device) = found.values()
        assert dtypes == {torch.bfloat16}
        assert device == torch.device("cpu")
        assert_bitwise_equal(offloaded, exact)
        off = max(float((near[name] - value).abs().max()) for name, value in exact.items())
        assert 1e-6 < off < 1e-2
        assert {value.dtype for value in near.values()} == {torch.float32}


def grouped():
    """Two param groups, whose optimizer has made updates before."""
    torch.manual_seed(0)
    model = Switched().double()
    head = {"params": [*model.head.parameters()], "lr": 0.1, "weight_decay": 0.3}
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    state = lk.TrainState(model, torch.optim.AdamW([head, {"params": rest}], lr=0.01))
    train_by_hand(classifier, state, [*switched(batches(3))])
    return state


def went_on(strategy, data):
    state = grouped()
    lk.run(lk.distributed(strategy)(classifier), state, data, max_epochs=1).finish()
    assert [(g["lr"], g["weight_decay"]) for g in state.optimizer.param_groups] == [
        (0.1, 0.3),
        (0.01, 0.01),
    ]
    first = whole(state.model.state_dict())
    # Another optimizer, made of what is there now: shards
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1, momentum=0.9)
    lk.run(lk.distributed(strategy)(classifier), state, data, max_epochs=2).finish()
    return first, whole(state.model.state_dict())


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_an_optimizer_may_be_made_before_sharding_or_after(strategy):
    """Its groups and its state go on over the shards; and one made of shards trains as well."""
    data, state = [*switched(batches(8))], grouped()
    train_by_hand(classifier, state, data, accumulate=2)
    before = whole(state.model.state_dict())
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1, momentum=0.9)
    train_by_hand(classifier, state, data, accumulate=2)
    for first, last in POOL.run(2, went_on, strategy, data):
        close(first, before)
        close(last, state.model.state_dict())


MAKERS = {
    "amp": lambda: lk.with_amp("fp16", init_scale=2.0**10),
    "accumulation": lambda: lk.with_grad_accum(2),
    "clip": lambda: lk.with_clip(0.3),
    "ema": lambda: lk.with_ema(0.9),
    "schedule": lambda: lk.with_schedule(lr=halving),
}


def ordered(strategy, data):
    """The weights for `distributed` in each place among the others, and those turned round."""
    found = []
    for place, turn in itertools.product(range(len(MAKERS) + 1), (1, -1)):
        layers = [make() for make in [*MAKERS.values()][::turn]]
        layers.insert(place, lk.distributed(strategy))
        torch.manual_seed(0)
        model = Switched().double()
        state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        run = lk.run(lk.compose(*layers)(classifier), state, data, max_epochs=1)
        applied = [bool(state.applied) for state in run]
        found.append((whole(model.state_dict()), whole(state.features["ema"].weights), applied))
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_the_place_of_distributed_among_decorators_changes_no_bit(strategy):
    """Wherever it stands, and in both orders of the others; with an overflow on one rank."""
    data = [*switched(batches(19), bad={9})]
    for found in POOL.run(2, ordered, strategy, data):
        weights, averages, applied = found[0]
        assert applied == [True, True, False, True, True]
        for others, also, too in found[1:]:
            assert too == applied
            assert_bitwise_equal(others, weights)
            assert_bitwise_equal(also, averages)


def unevenly(data):
    found = {}
    for uneven in ("exact", "drop", "pad"):
        state = fresh()
        run = lk.run(lk.distributed(uneven=uneven)(classifier), state, data, max_epochs=2)
        found[uneven] = [s.step for s in run][-1], whole(state.model.state_dict())
    return found


def test_the_uneven_end_follows_its_policy():
    """Five batches of two ranks: the last alone, left out, or beside the first once more."""
    data = batches(5)
    shares = {"exact": [data], "drop": [data[:4]], "pad": [[*data, data[0]]]}
    for found in POOL.run(2, unevenly, data):
        for uneven, (steps, weights) in found.items():
            state = fresh()
            for _ in range(2):
                (epoch,) = shares[uneven]
                train_by_hand(classifier, state, epoch, accumulate=2)
            assert steps == (4 if uneven == "drop" else 6)
            close(weights, state.model.state_dict())


def asked():
    lk.distributed()(classifier).set_up(fresh())
    rank = dist.get_rank()
    values = {"a": rank + 1.0, "b": torch.tensor(-2.0 * rank)}
    reduce = functools.partial(lk.reduce, values)
    answers = [lk.agree(rank == 1), lk.agree(False), lk.agree(True)]
    return answers, [reduce(op=op) for op in ("mean", "sum", "max", "min")], reduce(weight=3 * rank)


def test_ranks_ask_each_other():
    """One that says yes is enough; means, weighted ones, sums, the largest and the smallest."""
    for answers, (mean, total, largest, smallest), weighted in POOL.run(3, asked):
        assert answers == [True, False, True]
        assert mean == {"a": 2.0, "b": -2.0}
        assert total == {"a": 6.0, "b": -6.0}
        assert largest == {"a": 3.0, "b": 0.0}
        assert smallest == {"a": 1.0, "b": -4.0}
        assert weighted == pytest.approx({"a": 24 / 9, "b": -30 / 9})


def waits(strategy):
    step, state = lk.distributed(strategy, timeout_s=77)(classifier), fresh()
    lk.run(step, state, batches(4), max_steps=1).finish()
    groups = [g for g in dist.distributed_c10d._world.pg_map if dist.get_world_size(g) > 1]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize(
    ("strategy", "groups"),
    [(lk.FSDP(replicas=2), 3), (lk.TensorParallel({}, size=2), 3), (lk.TensorParallel({}), 1)],
)
def test_no_group_waits_longer_than_was_asked_for(strategy, groups):
    """After the first update it is the time limit of each group, those of a mesh included."""
    for seconds in POOL.run(4, waits, strategy):
        assert len(seconds) >= groups
        assert {*seconds} == {77.0}
