"""What goes together with each strategy: compiling, checkpointing, hooks, methods of the model."""

import warnings

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, train_by_hand
from test_parity import Blocks, classifier, close, whole
from torch import nn
from torch.utils.checkpoint import checkpoint

from pool import POOL
from problems import make_batches


class Recomputed(Blocks):
    """The blocks, with the activations of each computed again for the backward pass."""

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        inner = checkpoint(self.layers[0], hidden, use_reentrant=False)
        inner = checkpoint(self.layers[1], torch.tanh(inner), use_reentrant=False)
        return self.head(hidden + inner)


class Spoken(Blocks):
    """The blocks, with methods that run the forward beside `forward`."""

    def classify(self, inputs, labels):
        return nn.functional.cross_entropy(self(inputs), labels)

    def respond(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        return self.head(hidden + self.layers[1](torch.tanh(self.layers[0](hidden))))

    def inward(self, inputs):
        return self.layers[1](self.layers[0](nn.functional.pad(inputs, (0, 4))))


class Sparse(Blocks):
    """The blocks, with a layer that only batches with a positive sum use."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 3)

    def forward(self, inputs):
        found = super().forward(inputs)
        return found + self.spare(inputs) if inputs.sum() > 0 else found


class Idle(Blocks):
    """The blocks, with a layer that nothing uses."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 3)


def fresh(model=Blocks, optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    made = model().to(torch.float64)
    return lk.TrainState(made, optimizer(made.parameters(), lr=0.01))


def responding(state, batch):
    return nn.functional.cross_entropy(state.model.respond(batch[0]), batch[1])


def classifying(state, batch):
    return state.model.classify(*batch)


def twice(state, batch):
    inputs, labels = batch
    logits = state.model(inputs) + 0.5 * state.model(inputs.flip(1))
    return nn.functional.cross_entropy(logits, labels)


def compiled(state):
    # torch's compiler looks at the gradients of what FSDP has gathered (torch 2.13)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    state.model.compile(backend="aot_eager")


def decorated(state):
    """Says that the decorator compiles."""


def trained(model, strategy, function, data, before=None, accumulate=1):
    layers = [lk.with_compile(backend="aot_eager")] * (before is decorated)
    if before is decorated:  # see `compiled`
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    layers += [lk.with_clip(0.5), lk.with_ema(0.9)]
    layers += [lk.with_grad_accum(accumulate)] * (accumulate > 1)
    step = lk.compose(*layers, lk.distributed(strategy))(function)
    state = fresh(model)
    keys = [*state.model.state_dict()]
    if before is not None:
        before(state)
    [*lk.run(step, state, data, max_epochs=1)]
    assert [*state.model.state_dict()] == keys
    return whole(state.model.state_dict())


CASES = {
    "ddp, compiled": (Blocks, "ddp", classifier, compiled),
    "fsdp, compiled": (Blocks, "fsdp", classifier, compiled),
    "fsdp, with_compile": (Blocks, "fsdp", classifier, decorated),
    "ddp, checkpointed": (Recomputed, "ddp", classifier, None),
    "fsdp, checkpointed": (Recomputed, "fsdp", classifier, None),
    "zero2, checkpointed": (Recomputed, "zero2", classifier, None),
    "ddp, a method": (Spoken, "ddp", responding, None),
    "ddp, a method that calls the model": (Spoken, "ddp", classifying, None),
    "fsdp, a method that calls the model": (Spoken, "fsdp", classifying, None),
    "fsdp, a method": (Spoken, lk.FSDP(methods=("respond",)), responding, None),
    "ddp, a forward twice": (Blocks, "ddp", twice, None),
    "fsdp, a forward twice": (Blocks, "fsdp", twice, None),
    "ddp, unused parameters": (Sparse, lk.DDP(find_unused_parameters=True), classifier, None),
    "fsdp, parameters unused by all": (Idle, "fsdp", classifier, None),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_one_process(case, accumulate):
    """Whatever of the model is called, and how: the weights are those of the plain loop."""
    model, strategy, function, before = CASES[case]
    data = make_batches(13, dtype=torch.float64)
    found = POOL.run(2, trained, model, strategy, function, data, before, accumulate)
    state = fresh(model)
    train_by_hand(function, state, data, accumulate=2 * accumulate, clip=0.5)
    for weights in found:
        close(weights, state.model.state_dict())


def compressed(hook, data):
    step = lk.compose(lk.with_grad_accum(2), lk.distributed(lk.DDP(comm_hook=hook)))(classifier)
    state = fresh(optimizer=torch.optim.SGD)
    state.model.to(torch.float32)
    [*lk.run(step, state, data, max_epochs=1)]
    return state.model.state_dict()


def summed(group, bucket):
    """A hook of a user's own: the mean, and every rank takes note of it."""
    tensor = bucket.buffer().div_(torch.distributed.get_world_size())
    work = torch.distributed.all_reduce(tensor, group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@pytest.mark.parametrize("hook", ["fp16", summed], ids=["fp16", "own"])
def test_gradients_travel_compressed(hook):
    """The weights are those of the plain loop, as far as the bits of the hook go."""
    data = make_batches(12)
    (one, other) = POOL.run(2, compressed, hook, data)
    assert_bitwise_equal(one, other)
    state = fresh(optimizer=torch.optim.SGD)
    state.model.to(torch.float32)
    train_by_hand(classifier, state, data, accumulate=4)
    expected = state.model.state_dict()
    off = max(float((one[name] - value).abs().max()) for name, value in expected.items())
    assert off < (1e-6 if hook is summed else 1e-3)
    assert (off > 1e-7) == (hook is not summed)  # it was compressed at all


def responding_in_evaluation(strategy, data):
    step, state = lk.distributed(strategy)(classifier), fresh(Spoken)
    step.set_up(state)
    return lk.evaluate(responding, state, data)["loss"]


@pytest.mark.parametrize("strategy", ["ddp", lk.FSDP(methods=("respond",))], ids=["ddp", "fsdp"])
def test_methods_evaluate(strategy):
    """The same methods run in an evaluation, on all ranks."""
    data = make_batches(5, dtype=torch.float64)
    expected = lk.evaluate(responding, fresh(Spoken), data)["loss"]
    for loss in POOL.run(2, responding_in_evaluation, strategy, data):
        assert loss == pytest.approx(expected, rel=1e-9)


def inward(state, batch):
    return state.model.inward(batch[0]).square().mean() + classifier(state, batch)


def refused(strategy, model, function, evaluating=False):
    state, data = fresh(model), make_batches(8, dtype=torch.float64)
    step = lk.distributed(strategy)(function)
    with pytest.raises(lk.UsageError) as caught:
        if evaluating:
            lk.distributed(strategy)(classifier).set_up(state)
            lk.evaluate(function, state, data)
        else:
            [*lk.run(step, state, data, max_epochs=1)]
    return str(caught.value)


@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("function", [responding, inward])
def test_a_method_behind_the_shards_is_an_error_that_names_methods(function, evaluating):
    """What runs layers of shards by itself is told of methods=(...), not of aten and DTensors."""
    for message in POOL.run(2, refused, "fsdp", Spoken, function, evaluating):
        assert "a step function on a Spoken in shards" in message
        assert 'lk.FSDP(methods=("its_name",))' in message


def test_parameters_without_gradient_are_an_error_that_names_the_setting():
    """DDP waits for the gradient of each parameter; where one has none, the error tells."""
    for message in POOL.run(2, refused, "ddp", Idle, classifier):
        assert "spare.weight, spare.bias" in message
        assert "lk.DDP(find_unused_parameters=True)" in message


class Normed(Blocks):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_batch_norm_over_ranks_needs_an_accelerator():
    """Torch has it for accelerators only; on a CPU the set-up says so, before any training."""
    for message in POOL.run(2, refused, lk.DDP(sync_batchnorm=True), Normed, classifier):
        assert "DDP(sync_batchnorm=True)" in message
        assert "a model on cpu" in message


class Hook:
    def __call__(self, group, bucket):
        raise NotImplementedError


def test_a_hook_that_torch_does_not_take():
    """An object with a __call__ is refused at set-up, with the form that is taken."""
    for message in POOL.run(2, refused, lk.DDP(comm_hook=Hook()), Blocks, classifier):
        assert "that torch refuses it" in message
        assert "a function (group, bucket)" in message


def test_gloo_has_no_compression_to_bf16():
    """What torch refuses for gloo is an error at set-up that names the other hook."""
    for message in POOL.run(2, refused, lk.DDP(comm_hook="bf16"), Blocks, classifier):
        assert "that torch refuses it: BF16" in message
        assert 'DDP(comm_hook="fp16")' in message
