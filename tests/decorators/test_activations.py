"""Activations that are computed again, or kept on the host: the same bits, less memory."""

import copy
import pickle

import loopkit as lk
import pytest
import torch
from loopkit.testing import Problem, assert_bitwise_equal, check_decorator
from torch import nn

from problems import classifier, make_batches


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.3)

    def forward(self, x, scale=1.0):
        return x + scale * self.drop(self.b(torch.relu(self.a(self.norm(x)))))


class Deep(nn.Module):
    def __init__(self, width=8, depth=4):
        super().__init__()
        self.inlet = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


def make_deep(width=8, depth=4):
    torch.manual_seed(0)
    model = Deep(width, depth)
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))


OTHERS = {
    "plain": [],
    "fp16": [lk.with_amp("fp16", init_scale=64.0), lk.with_clip(0.5), lk.with_grad_accum(2)],
    "bf16": [lk.with_amp("bf16"), lk.with_ema(0.9)],
    "sam": [lk.with_sam(0.1)],
    "in backward": [lk.with_optimizer_in_backward()],
    "micro-batches": [lk.with_microbatch(3), lk.with_freeze("layers.0")],
}
POLICIES = [
    lk.with_activation_checkpointing(),
    lk.with_activation_checkpointing(Block, every=2),
    lk.with_activation_checkpointing("layers.[12]"),
    lk.with_activation_checkpointing(lambda name, module: name.endswith("3")),
    lk.with_activation_checkpointing(["head", Block], save="matmuls"),
    lk.with_activation_checkpointing(save=[torch.ops.aten.addmm, torch.ops.aten.relu.default]),
    lk.with_activation_offload(),
    lk.compose(lk.with_activation_offload(), lk.with_activation_checkpointing(Block)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("others", OTHERS)
def test_all_is_bitwise_equal_to_plain_training(policy, others):
    """Weights, running statistics, optimizer and random numbers are as without it, dropout too."""
    states = [make_deep(), make_deep()]
    for state, stack in zip(states, ([policy, *OTHERS[others]], OTHERS[others]), strict=True):
        step = lk.compose(*stack)(classifier) if stack else classifier
        torch.manual_seed(2)
        [*lk.run(step, state, make_batches(5), max_epochs=2)]
    assert_bitwise_equal(states[0].state_dict(), states[1].state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [None, "matmuls"])
def test_a_compiled_model_is_checkpointed_too(save):
    """Compiled, the weights and running statistics are those of plain training."""
    states = [make_deep(), make_deep()]
    for state, decorator in zip(
        states, (lk.with_activation_checkpointing(save=save), lk.with_clip(1e9)), strict=True
    ):
        for layer in state.model.layers:
            layer.drop.p = 0.0  # a compiled dropout draws in another way
        step = decorator(lk.with_clip(1e9)(classifier) if state is states[0] else classifier)
        step.set_up(state)
        state.model.compile(backend="aot_eager")
        for batch in make_batches(3):
            step(state, batch)
    for name, value in states[0].model.state_dict().items():
        torch.testing.assert_close(value, states[1].model.state_dict()[name])


def saved_bytes(decorator):
    """Bytes that the forward leaves for the backward pass, each storage once."""
    state = make_deep(16, 6)
    own = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    step = decorator(classifier).set_up(state) and decorator(classifier)
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step.forward(state, make_batches(1, size=64)[0])
    return sum(size for size, _ in seen.values())


def test_it_saves_memory():
    """What is kept for backward falls to a fraction; every second block saves half of that."""
    plain = saved_bytes(lk.with_clip(1.0))
    every = saved_bytes(lk.with_activation_checkpointing())
    half = saved_bytes(lk.with_activation_checkpointing(every=2))
    assert every < 0.2 * plain
    assert half == pytest.approx((plain + every) / 2, rel=0.05)


def count_matmuls(save):
    state = make_deep()
    step = lk.with_activation_checkpointing(save=save)(classifier)
    step.set_up(state)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += function._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
            return function(*args, **(kwargs or {}))

    with Count() as count:
        step(state, make_batches(1)[0])
    return count.found


def test_selective_checkpointing_does_not_compute_what_it_keeps():
    """With save="matmuls" no matrix product is made twice; without it those of a block are."""
    state = make_deep()
    blocks = 2 * len(state.model.layers)
    total = count_matmuls(None)
    # The last product of a block is not needed for its backward pass, and is not made again.
    assert blocks // 2 <= total - count_matmuls("matmuls") <= blocks


def test_the_model_stays_plain():
    """Class, keys, names and isinstance are as before; it copies, pickles and evaluates."""
    state = make_deep()
    names = [name for name, _ in state.model.named_modules()]
    keys = [*state.model.state_dict()]
    step = lk.with_activation_checkpointing()(classifier)
    step(state, make_batches(1)[0])
    assert [name for name, _ in state.model.named_modules()] == names
    assert [*state.model.state_dict()] == keys
    assert all(type(layer) is Block for layer in state.model.layers)
    copied, pickled = copy.deepcopy(state.model), pickle.loads(pickle.dumps(state.model))
    inputs = make_batches(1)[0][0]
    for model in (copied, pickled):
        assert model.layers[0].forward.block is model.layers[0]
        model.eval(), state.model.eval()
        assert torch.equal(model(inputs), state.model(inputs))
    branch = state.snapshot()
    assert branch.model.layers[1].forward.block is branch.model.layers[1]


def test_a_second_state_on_the_same_model_does_not_checkpoint_twice():
    """Preparing a prepared model computes each block again once, not twice."""
    state = make_deep()
    step = lk.with_activation_checkpointing()(classifier)
    calls = []
    for layer in state.model.layers:
        layer.a.register_forward_hook(lambda *_: calls.append(1))
    for each in (state, lk.TrainState(state.model, state.optimizer)):
        calls.clear()
        step(each, make_batches(1)[0])
        assert len(calls) == 2 * 4


def test_a_forward_that_a_block_had_of_its_own_is_called():
    """What others have put on a module, as adapters do, is computed again, not lost."""
    state, calls = make_deep(), []
    block = state.model.layers[0]
    own = block.forward

    def doubled(*args, **kwargs):
        calls.append(1)
        return 2 * own(*args, **kwargs)

    block.forward = doubled
    step = lk.with_activation_checkpointing()(classifier)
    for each in (state, lk.TrainState(state.model, state.optimizer)):
        calls.clear()
        step(each, make_batches(1)[0])
        assert len(calls) == 2


@pytest.mark.parametrize(
    "decorator",
    [
        lk.with_activation_checkpointing(),
        lk.with_activation_checkpointing(Block, save="matmuls"),
        lk.with_activation_offload(),
    ],
    ids=repr,
)
def test_they_keep_the_laws(decorator):
    """They compare, pickle, resume bit for bit, and stand anywhere."""
    check_decorator(decorator, Problem(make_deep, classifier, make_batches(5)))


WRONG = {
    "a model without lists": (
        lambda: lk.with_activation_checkpointing()(classifier).set_up(
            lk.TrainState(m := nn.Linear(1, 1), torch.optim.SGD(m.parameters()))
        ),
        "no such block in Linear",
    ),
    "a type that is not there": (
        lambda: lk.with_activation_checkpointing(nn.LSTM)(classifier).set_up(make_deep()),
        "Block",
    ),
    "a name that is not there": (
        lambda: lk.with_activation_checkpointing("layer.*")(classifier).set_up(make_deep()),
        "'layers.",
    ),
    "each zeroth": (lambda: lk.with_activation_checkpointing(every=0), "every = 0"),
    "a number of blocks": (lambda: lk.with_activation_checkpointing(3), "int"),
    "operators that are none": (lambda: lk.with_activation_checkpointing(save="mm"), "save = 'mm'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_policy_is_an_error_that_teaches(case):
    """A policy that fits nothing is told with what the model has."""
    wrong, found = WRONG[case]
    with pytest.raises(lk.UsageError) as caught:
        wrong()
    assert found in str(caught.value)
