"""What a forward has gathered: kept for its backward pass, and for nothing that comes later."""

import contextlib
import functools

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from test_parity import Blocks, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pool import POOL
from problems import make_batches

STRATEGIES = ["fsdp", "zero2"]
cross_entropy = nn.functional.cross_entropy
INPUTS = make_batches(1, dtype=torch.float64, seed=5)[0][0]


class Spoken(Blocks):
    """The blocks, with methods that run the forward beside `forward`."""

    def respond(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        return self.head(hidden + self.layers[1](torch.tanh(self.layers[0](hidden))))

    def answer(self, inputs):
        return self(inputs) + self.head(torch.tanh(self.first(inputs)))


METHODS = ("respond", "answer")


def fresh(optimizer=torch.optim.AdamW, seed=0):
    torch.manual_seed(seed)
    model = Spoken().double()
    return lk.TrainState(model, optimizer(model.parameters(), lr=0.01))


def of(strategy):
    """The named strategy, with the model's methods."""
    settings = {"reshard_after_forward": strategy != "zero2", "sync_every": "each" in strategy}
    return lk.FSDP(methods=METHODS, **settings)


def classifier(state, batch):
    return cross_entropy(state.model(batch[0]), batch[1])


# Ways to look at a state between updates, and ways in which its weights change


def by_hand(state):
    return state.model(INPUTS).detach()


def without_gradient(state):
    with torch.no_grad():
        return state.model(INPUTS)


def by_a_method(state):
    return state.model.respond(INPUTS).detach()


def by_a_nested_method(state):
    return state.model.answer(INPUTS).detach()


def evaluated(state):
    found = lk.evaluate(lambda s, b: {"loss": s.model(b).square().mean()}, state, [INPUTS] * 2)
    return torch.tensor(found["loss"])


def predicted(state):
    first, _ = lk.predict(lambda s, b: s.model(b), state, [INPUTS] * 2)
    return first


def with_its_backward(state):
    loss = state.model(INPUTS).square().mean()
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


LOOKS = [
    by_hand, without_gradient, with_its_backward, by_a_method, by_a_nested_method, evaluated,
    predicted,
]  # fmt: skip


def averages(state, look, folder):
    with lk.ema_weights(state):
        return look(state)


def change_in_place(state, look, folder):
    """What acts on shards, as an optimizer does: one's own, or a schedule-free one's `eval()`."""
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.mul_(0.5)
    return look(state)


def restoring(state, look, folder):
    lk.Checkpointer(folder).restore(state)
    return look(state)


def loading(state, look, folder):
    """By torch's own way, twice as large as they were."""
    held = state.model.state_dict()
    state.model.load_state_dict({name: tensor * 2 for name, tensor in held.items()})
    return look(state)


CHANGES = [averages, change_in_place, averages, restoring, loading]


def train(step, state, batches):
    """Each rank trains on all, so that the mean over two ranks is what one has, bit for bit."""
    for batch in batches:
        step(state, batch)


def looked_at(strategy, look, folder):
    """What one sees of a state before and after each change, and the kinds of its parameters."""
    step = lk.compose(lk.with_ema(0.5), lk.distributed(strategy))(classifier)
    state, seen, kinds = fresh(), [], set()
    batches = make_batches(len(CHANGES) + 1, dtype=torch.float64)
    train(step, state, batches[:1])
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.save(state)
    for change, batch in zip(CHANGES, batches[1:], strict=True):
        train(step, state, [batch])
        seen += [look(state).clone(), change(state, look, folder).clone(), look(state).clone()]
        kinds |= {isinstance(p, DTensor) for p in state.model.parameters()}
    return seen, kinds, whole(state.model.state_dict())


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_forward_sees_the_weights_of_now(strategy, look, tmp_path):
    """Averages swapped in and out, weights changed in place or loaded: as on one process."""
    seen, _, weights = looked_at("auto", look, tmp_path / "alone")
    assert not any(map(torch.equal, seen[::3], seen[1::3]))
    for found, sharded, others in POOL.run(2, looked_at, of(strategy), look, tmp_path / "ranks"):
        assert_bitwise_equal(found, seen)
        assert_bitwise_equal(others, weights)
        assert sharded == {True}


# Steps whose forwards and backwards meet in other ways


def twice(state, batch):
    logits = state.model(batch[0]) + 0.5 * state.model(batch[0].flip(1))
    return cross_entropy(logits, batch[1])


def twice_by_methods(state, batch):
    logits = state.model.respond(batch[0]) + 0.5 * state.model.answer(batch[0].flip(1))
    return cross_entropy(logits, batch[1])


def target_after(state, batch):
    """The same model says without gradient what its other output shall be like."""
    logits = state.model(batch[0])
    with torch.no_grad():
        target = state.model(batch[0] + 0.1)
    return cross_entropy(logits, batch[1]) + (logits - target).square().mean()


def teacher(state, batch):
    """The averages of before are what the model learns from."""
    target = 0.0
    if state.step:
        with lk.ema_weights(state):
            target = state.model(batch[0])
    logits = state.model(batch[0])
    return cross_entropy(logits, batch[1]) + (logits - target).square().mean()


def ahead(state, batch):
    """Where the weights change between two forwards, of which the first needs no backward."""
    target = state.model(batch[0]).detach()
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.mul_(0.9)
    logits = state.model(batch[0])
    return cross_entropy(logits, batch[1]) + (logits - target).square().mean()


def checkpointed(state, batch, reentrant):
    inputs = batch[0].clone().requires_grad_()
    logits = checkpoint(state.model, inputs, use_reentrant=reentrant)
    return cross_entropy(logits, batch[1])


def checkpointed_to_the_end(state, batch):
    """The forward that is computed again ends, rather than stop at the last tensor needed."""
    with set_checkpoint_early_stop(False):
        return checkpointed(state, batch, reentrant=False)


def penalised(state, batch):
    """A gradient of a gradient, with a backward pass within the forward."""
    inputs = batch[0].clone().requires_grad_()
    loss = cross_entropy(state.model(inputs), batch[1])
    (slope,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    return loss * (1 + slope.square().sum())


AGAIN = functools.partial(checkpointed, reentrant=False)
AGAIN_REENTRANT = functools.partial(checkpointed, reentrant=True)
STEPS = {
    "plain": (classifier, []),
    "two forwards": (twice, []),
    "two methods": (twice_by_methods, []),
    "a target of its own": (target_after, []),
    "a teacher": (teacher, []),
    "a look ahead": (ahead, []),
    "a backward within": (penalised, []),
    "blocks computed again": (classifier, [lambda: lk.with_activation_checkpointing("layers.*")]),
    "all computed again": (AGAIN, []),
    "all computed again, to the end": (checkpointed_to_the_end, []),
    "all computed again, reentrant": (AGAIN_REENTRANT, []),
    "two, and blocks again": (twice, [lambda: lk.with_activation_checkpointing("layers.*")]),
    "sharpness-aware": (classifier, [lambda: lk.with_sam(0.1)]),
    "in parts": (twice, [lambda: lk.with_microbatch(2)]),
    "in parts that fit": (twice, [lambda: lk.with_microbatch("auto")]),
}
WINDOWS = ["two forwards", "a target of its own", "all computed again"]


def trained(strategy, case, window):
    """The weights after each update, on batches that are those of all ranks."""
    function, decorators = STEPS[case]
    accumulated = [lk.with_grad_accum(window)] * (window > 1)
    layers = [make() for make in decorators] + accumulated + [lk.with_ema(0.5)]
    step, state, found = lk.compose(*layers, lk.distributed(strategy))(function), fresh(), []
    batches = make_batches(4 * window, size=4, dtype=torch.float64)
    for update in lk.windows(batches, window) if window > 1 else batches:
        step(state, update)
        found.append(whole(state.model.state_dict()))
    return found


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fsdp, syncing each time"])
@pytest.mark.parametrize(
    ("case", "window"), [*((case, 1) for case in STEPS), *((case, 2) for case in WINDOWS)]
)
def test_updates_are_those_of_one_process(strategy, case, window):
    """However often the model is called before its backward pass, or within it, bit for bit."""
    expected = trained("auto", case, window)
    assert not torch.equal(expected[0]["head.weight"], expected[-1]["head.weight"])
    for found in POOL.run(2, trained, of(strategy), case, window):
        assert_bitwise_equal(found, expected)


class Scorer(Blocks):
    """What says how true an output of the other model looks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)


def against_each_other(strategy):
    """A generator and a discriminator, each sharded, with steps that run the other's forward."""
    made = fresh()
    model = Scorer().double()
    scorer = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def judge(state, batch, gradient):
        with contextlib.nullcontext() if gradient else torch.no_grad():
            fake = made.model(batch[0])
        return (state.model(fake.detach()) - 1).square().mean()

    def make(state, batch):
        return scorer.model(state.model(batch[0])).square().mean()

    generate = lk.compose(lk.with_ema(0.5), lk.distributed(strategy))(make)
    judged = lk.distributed(strategy)(functools.partial(judge, gradient=True))
    judged_without = lk.distributed(strategy)(functools.partial(judge, gradient=False))
    generate.set_up(made)
    judged.set_up(scorer)
    found = []
    for i, batch in enumerate(make_batches(6, dtype=torch.float64)):
        step = judged if i % 2 else judged_without
        step(scorer, batch)
        generate(made, batch)
        with lk.ema_weights(made):
            found.append(made.model(batch[0]).clone())
        found.append(made.model(batch[0]).detach().clone())
    return found, whole(made.model.state_dict()), whole(scorer.model.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_sharded_models_train_against_each_other(strategy):
    """Each runs the other's forward, with gradients that go on to it and without, bit for bit."""
    expected = against_each_other("auto")
    for found in POOL.run(2, against_each_other, lk.FSDP(reshard_after_forward=strategy == "fsdp")):
        assert_bitwise_equal([*found], [*expected])


class Gathers(TorchDispatchMode):
    """How often parameters are gathered."""

    times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += "_allgather_base" in str(function) or "all_gather_into" in str(function)
        return function(*args, **(kwargs or {}))


def gathers(case, window):
    """Of an update of each strategy, in its forwards and its backward."""
    found = {}
    for strategy in STRATEGIES:
        function, _ = STEPS[case]
        layers = [lk.with_grad_accum(window)] * (window > 1)
        step, state = lk.compose(*layers, lk.distributed(of(strategy)))(function), fresh()
        batches = make_batches(2 * window, dtype=torch.float64)
        counts = []
        for update in lk.windows(batches, window) if window > 1 else batches:
            with Gathers() as counted:
                step(state, update)
            counts.append(counted.times)
        with Gathers() as counted, torch.no_grad():
            state.model(INPUTS)
        found[strategy] = [*counts, counted.times]
    return found


@pytest.mark.parametrize("window", [1, 3])
def test_what_is_outside_of_the_blocks_is_gathered_once_for_each_micro_batch(window):
    """Two blocks twice, for forward and backward, and the rest once; by stage 2 all once."""
    for found in POOL.run(2, gathers, "plain", window):
        assert found["fsdp"] == [5 * window] * 2 + [3]
        assert found["zero2"] == [3 * window] * 2 + [3]


def test_a_forward_that_is_computed_again_finds_what_is_gathered():
    """Within a backward pass nothing is freed, to be gathered once more."""
    for case in ("all computed again", "all computed again, to the end"):
        for found in POOL.run(2, gathers, case, 1):
            assert found["fsdp"] == [5, 5, 3]
            assert found["zero2"] == [3, 3, 3]


def failed(strategy):
    """What its parameters are after a step that has run a forward, and then failed."""

    def step(state, batch):
        loss = classifier(state, batch)
        if state.step == 1:
            raise ValueError("a label that is not there")
        return loss

    lifted, state = lk.compose(lk.with_ema(0.5), lk.distributed(strategy))(step), fresh()
    first, second = make_batches(2, dtype=torch.float64)
    lifted(state, first)
    with pytest.raises(ValueError, match="a label that is not there"):
        lifted(state, second)
    shards = all(isinstance(p, DTensor) for p in state.model.parameters())
    return shards, averages(state, by_hand, None), by_hand(state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_failed_leaves_shards(strategy):
    """Who catches its error may go on to look at the state, with averages too."""
    _, *expected = failed("auto")
    for shards, *found in POOL.run(2, failed, of(strategy)):
        assert shards
        assert_bitwise_equal(found, expected)
