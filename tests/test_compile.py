"""Compiled steps and models against uncompiled ones, and what compiling leaves as it was."""

import copy
import functools
import itertools
import pickle
import warnings

import loopkit as lk
import pytest
import torch
from loopkit.functional import functional_form
from loopkit.graphs import Program, allow_backward
from loopkit.testing import train_by_hand
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.nn import functional as F

from problems import MODELS, classifier, halving, make_batches, make_state, train

pytestmark = [  # torch's own: an import of inductor, and a look of dynamo at a block's input
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

FEATURES = {
    "bf16": (lk.with_amp("bf16"), {"amp": "bf16"}),
    "accumulation": (lk.with_grad_accum(3), {"accumulate": 3}),
    "clip": (lk.with_clip(0.3), {"clip": 0.3}),
    "clip value": (lk.with_clip_value(0.05), {"clip_value": 0.05}),
    "schedule": (lk.with_schedule(lr=halving), {"lr": halving}),
    "ema": (lk.with_ema(0.7), {"ema": 0.7}),
    "skip": (lk.with_nonfinite("skip"), {"skip_nonfinite": True}),
    "raise": (lk.with_nonfinite("raise"), {}),
}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "fused adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=0.5),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.01),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
    "radam": functools.partial(torch.optim.RAdam, lr=0.01),
    "rprop": functools.partial(torch.optim.Rprop, lr=0.01),  # which has no form we know
}
# The tracing, the places and the functional forms are the same for each backend; this one
# runs torch's own kernels, so that a hundred compositions compile in seconds.
with_compile = functools.partial(lk.with_compile, "step", backend="eager")


def state_of(model="mlp", optimizer="adamw", seed=0):
    torch.manual_seed(seed)
    made = MODELS[model]()
    return lk.TrainState(made, OPTIMIZERS[optimizer](made.parameters()))


def assert_close(found, wanted, **tolerance):
    """Equal but for the rounding of fused operations."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    torch.testing.assert_close(found, wanted, **tolerance)


def assert_as_by_hand(names, model="mlp", optimizer="adamw", batches=None, compiled=None, **tol):
    """The compiled step and the hand-written loop agree in all that training leaves."""
    batches = make_batches() if batches is None else batches
    ours, theirs = state_of(model, optimizer), state_of(model, optimizer)
    layers = [*(FEATURES[name][0] for name in names), compiled or with_compile()]
    step = lk.compose(*layers)(classifier)
    torch.manual_seed(2)
    seen = [(float(s.loss), bool(s.applied)) for s in lk.run(step, ours, batches, max_epochs=1)]
    wanted = {key: value for name in names for key, value in FEATURES[name][1].items()}
    torch.manual_seed(2)
    found = train_by_hand(classifier, theirs, batches, **wanted)
    assert_close(ours.model.state_dict(), theirs.model.state_dict(), **tol)
    assert [applied for _, applied in seen] == found.applied
    assert [loss for loss, _ in seen] == pytest.approx(found.losses, rel=1e-3, nan_ok=True)
    mine, its = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert_close(mine["state"], its["state"], **tol)
    if "ema" in names:
        assert_close(ours.features["ema"].weights, found.averages, **tol)
    return ours


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_step_trains_as_by_hand_with_each_optimizer(optimizer):
    """Weights and the optimizer's own state are those of the loop written by hand."""
    assert_as_by_hand([], optimizer=optimizer)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_each_decorator_stays_true_in_a_compiled_step(name, optimizer):
    """A compiled step with one decorator trains as the loop written by hand."""
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if name == "bf16" else {}
    assert_as_by_hand([name], optimizer=optimizer, **tolerance)


ALL = ["accumulation", "clip value", "clip", "schedule", "ema", "skip"]


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"dropout"}))
def test_all_decorators_together_stay_true_in_a_compiled_step(model):
    """Windows (the last one short), clipping, schedule, averages and skipping, all at once."""
    # AdamW would make whole steps of the rounding in the gradient (0) of a bias before BatchNorm
    assert_as_by_hand(ALL, model, "momentum" if model == "conv" else "adamw")


def test_inductor_trains_as_by_hand_with_all_decorators():
    """The default backend, whole updates and windows: equal up to rounding."""
    loose = {"rtol": 1e-4, "atol": 1e-5}
    assert_as_by_hand(
        ["clip", "schedule", "ema", "skip"], compiled=lk.with_compile("step"), **loose
    )
    assert_as_by_hand(ALL, compiled=lk.with_compile("step"), **loose)


def test_a_batch_with_a_nan_is_skipped_on_the_device():
    """Within the graph a non-finite update leaves weights, optimizer, averages and count alone."""
    batches = make_batches()
    batches[3][0][0, 0] = float("nan")
    for names in (["skip"], ["skip", "schedule", "ema", "clip"], ["skip", "accumulation"]):
        assert_as_by_hand(names, batches=batches)


def test_raising_on_a_nan_leaves_the_weights_of_the_update_before():
    """with_nonfinite("raise") raises out of a compiled step before the weights change."""
    batches = make_batches()
    batches[3][0][0, 0] = float("nan")
    state, step = state_of(), lk.with_nonfinite("raise")(with_compile()(classifier))
    for batch in batches[:3]:
        step(state, batch)
    before = [p.clone() for p in state.parameters()]
    with pytest.raises(lk.NonFiniteError, match="update 4"):
        step(state, batches[3])
    assert all(map(torch.equal, before, state.parameters()))


def graphs_of(action):
    """How many graphs torch compiled during it."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    action()
    return stats["unique_graphs"] - before


def test_an_update_is_one_graph_and_a_schedule_compiles_nothing_again():
    """All of an update is one graph, compiled once for many values of the schedule."""
    step = lk.compose(
        lk.with_clip(1.0), lk.with_schedule(lr=halving), lk.with_nonfinite("skip"), with_compile()
    )(classifier)
    state = state_of()
    assert graphs_of(lambda: train(step, state, make_batches(9))) == 1


def test_a_window_has_a_graph_for_its_micro_batches_and_one_for_the_rest():
    """Windows of 3, 3 and 2 micro-batches need no graphs of their own."""
    step = lk.compose(lk.with_grad_accum(3), lk.with_clip(1.0), with_compile())(classifier)
    graphs = graphs_of(lambda: train(step, state_of(), make_batches(8)))
    assert graphs <= 4  # gradients set and added to, for one number of micro-batches and any


def test_weights_as_tensors_stay_in_the_graph():
    """Micro-batches of unequal weights give the mean over all, as uncompiled; numbers, too."""

    def weighted(state, batch):
        inputs, labels = batch
        loss, kept = F.cross_entropy(state.model(inputs), labels, ignore_index=2), labels != 2
        numbers = {"half": 0.5, "long": len(labels) > 3, "size": len(labels), "word": "w"}
        return {"loss": loss, "weight": kept.sum(), "kept": kept.sum(), **numbers}

    ours, theirs = state_of(), state_of()
    accumulated = lk.with_grad_accum(3)(weighted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(with_compile()(accumulated), ours, make_batches())
    train(accumulated, theirs, make_batches())
    assert_close(ours.model.state_dict(), theirs.model.state_dict())
    assert ours.metrics.keys() == theirs.metrics.keys() == {*"loss kept half long size lr".split()}
    assert_close(ours.metrics, theirs.metrics)


def test_a_restored_optimizer_goes_on_with_its_own_state():
    """After load_state_dict the graph changes the optimizer's new tensors, not the old ones."""
    batches = make_batches(8)
    ours, step = state_of(), with_compile()(classifier)
    train(step, ours, batches[:4])
    saved = copy.deepcopy(ours.state_dict())
    straight = [float(loss) for loss in train(step, ours, batches[4:], max_epochs=2)]
    fresh = state_of(seed=3)
    fresh.load_state_dict(saved)
    assert train(with_compile()(classifier), fresh, batches[4:], max_epochs=2) == straight


def test_what_cannot_be_traced_runs_in_pieces_and_says_why():
    """A step function that prints goes on uncompiled where it must, with the same numbers."""

    def reading(state, batch):
        loss = classifier(state, batch)
        return loss * (2 if loss.item() > 0 else 1)

    ours, theirs = state_of(), state_of()
    with pytest.warns(lk.CompileWarning, match="data-dependent|item"):
        train(with_compile()(reading), ours, make_batches())
    train(reading, theirs, make_batches())
    assert_close(ours.model.state_dict(), theirs.model.state_dict())


def test_parameters_that_are_unused_or_frozen_stay_as_they_are():
    """A parameter without a gradient keeps its value and gets no optimizer state."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)

        def forward(self, inputs):
            return self.frozen(self.used(inputs))

    def made():
        torch.manual_seed(0)
        model = Part()
        return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    ours, theirs = made(), made()
    train(with_compile()(classifier), ours, make_batches())
    train(classifier, theirs, make_batches())
    assert_close(ours.model.state_dict(), theirs.model.state_dict())
    assert len(ours.optimizer.state) == len(theirs.optimizer.state) == 2


def test_two_steps_of_one_state_have_graphs_of_their_own():
    """Many steps made from one decorator do not use up each other's recompilations."""
    decorator, state = with_compile(), state_of("mlp", "sgd")
    for factor in range(12):
        step = decorator(lambda s, b, factor=factor: classifier(s, b) * (factor + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(state, make_batches(1)[0])
    assert state.step == 12


def test_a_compiled_step_prints_compares_and_pickles():
    """Compiling adds a feature that is a value like others."""
    assert with_compile().features == with_compile().features
    assert with_compile().features != lk.with_compile("step").features
    state, step = state_of(), with_compile()(classifier)
    train(step, state, make_batches())
    again = pickle.loads(pickle.dumps(step))
    assert again == step
    train(again, state, make_batches(), max_epochs=2)
    assert "update      with_compile('step', backend='eager')" in str(step)


def marked():
    """How many steps of CUDA graphs were marked so far."""
    from torch._inductor.cudagraph_trees import MarkStepBox  # which warns when it is imported

    return -MarkStepBox.mark_step_counter


@torch._dynamo.register_backend(name="like_cuda_graphs")
def like_cuda_graphs(graph, inputs, **settings):
    """Writes what it returns over what it returned in the step before, as CUDA graphs do."""
    memory, step, calls = {}, None, 0

    def call(*arguments):
        nonlocal step, calls
        calls = calls + 1 if step == marked() else 0
        step = marked()
        found, given = graph(*arguments), {id(argument) for argument in arguments}
        new = [t for t in found if isinstance(t, torch.Tensor) and id(t) not in given]
        held = memory.setdefault(calls, [t.detach().clone() for t in new])
        for mine, tensor in zip(held, new, strict=True):
            mine.copy_(tensor)
        mine = iter(held)
        return [next(mine) if any(t is n for n in new) else t for t in found]

    return call


@pytest.mark.parametrize("size", [1, 2])
def test_what_an_update_found_outlives_the_memory_of_its_cuda_graphs(size):
    """In a mode with CUDA graphs an update is one step of theirs, and its results are copied."""

    def step(state, batch):
        loss = classifier(state, batch)
        return {"loss": loss, "twice": 2 * loss}

    decorated = lk.compose(*[lk.with_grad_accum(size)] * (size > 1), lk.with_clip(0.3))(step)
    compiled = lk.with_compile("step", mode="reduce-overhead", backend="like_cuda_graphs")
    found = {}
    before = marked()
    for made in (decorated, compiled(decorated)):
        state = state_of()
        found[made] = [
            (state.loss, state.metrics["twice"], state.output["twice"], state.grad_norm)
            for state in lk.run(made, state, make_batches(8), max_epochs=1)
        ]
    assert marked() - before == state.step == 8 // size
    assert_close(*found.values())


changed_in_place = []


@torch._dynamo.register_backend(name="seen_by_cuda_graphs")
def seen_by_cuda_graphs(graph, inputs, **settings):
    """Notes the shapes of what a graph changes in place without knowing that it lies still."""

    def compiled(made, examples):
        found = TracingContext.get().fw_metadata
        moving = {*found.mutated_inp_runtime_indices} - {*found.static_input_indices}
        changed_in_place.append([examples[i].shape for i in sorted(moving)])
        return made.forward

    return aot_autograd(fw_compiler=compiled)(graph, inputs)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused adamw", "nadam"])
@pytest.mark.parametrize("size", [1, 2])
def test_cuda_graphs_change_in_place_only_what_lies_still(optimizer, size):
    """Torch makes none of a graph that changes other inputs than those, and gradients of graphs."""
    changed_in_place.clear()
    compiled = functools.partial(lk.with_compile, "step", backend="seen_by_cuda_graphs")
    layers = [lk.with_clip(0.3), lk.with_schedule(lr=halving)]
    layers += [lk.with_grad_accum(size)] * (size > 1)
    state = state_of(optimizer=optimizer)
    step = lk.compose(compiled(mode="reduce-overhead"), *layers)(classifier)
    train(step, state, make_batches(8))
    gradients = [p.shape for p in state.parameters()]  # from the graphs before, in their memory
    assert changed_in_place == ([[]] if size == 1 else [[], [], gradients])
    changed_in_place.clear()
    train(
        lk.compose(compiled(), *layers)(classifier), state_of(optimizer=optimizer), make_batches(8)
    )
    assert len(changed_in_place[-1]) > len(gradients) * (size > 1)  # without that mode: the state


def test_tracing_leaves_the_settings_of_torch_as_they_were():
    """What torch must allow while it traces our functions is set back, errors included."""
    before = torch._dynamo.config.trace_autograd_ops
    train(with_compile()(classifier), state_of(), make_batches(2))
    assert torch._dynamo.config.trace_autograd_ops == before

    def failing(x):
        allow_backward()
        return x + "text"

    program = Program("failing()", failing, {"backend": "eager"})
    with pytest.raises(TypeError), pytest.warns(lk.CompileWarning):
        program(3)
    assert torch._dynamo.config.trace_autograd_ops == before


def test_the_model_is_compiled_in_place_with_plain_keys():
    """Scope "model": the user's module, its keys, and its numbers."""
    ours, theirs = state_of(), state_of()
    model, keys = ours.model, [*ours.model.state_dict()]
    step = lk.with_compile(backend="eager")(lk.with_schedule(lr=halving)(classifier))
    assert graphs_of(lambda: train(step, ours, make_batches())) == 1
    train(lk.with_schedule(lr=halving)(classifier), theirs, make_batches())
    assert ours.model is model
    assert [*ours.model.state_dict()] == keys
    assert_close(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("blocks", [nn.Linear, "[03]", ["0", nn.Tanh]])
def test_blocks_are_compiled_one_by_one(blocks):
    """Only the chosen modules are compiled, by type or by a pattern of names."""
    ours, theirs = state_of(), state_of()
    train(lk.with_compile(blocks=blocks, backend="eager")(classifier), ours, make_batches())
    train(classifier, theirs, make_batches())
    compiled = {n for n, m in ours.model.named_modules() if m._compiled_call_impl is not None}
    assert compiled == ({"0", "1"} if isinstance(blocks, list) else {"0", "3"})
    assert_close(ours.model.state_dict(), theirs.model.state_dict())


def test_blocks_that_the_model_has_not_are_an_error():
    """An empty choice names the kinds of modules that there are."""
    with pytest.raises(lk.UsageError, match="Linear"):
        lk.with_compile(blocks="layers.*")(classifier)(state_of(), make_batches(1)[0])


def test_evaluation_can_run_uncompiled_where_shapes_vary():
    """Within set_stance("force_eager") an evaluation compiles nothing."""
    state = state_of()
    train(lk.with_compile(backend="eager")(classifier), state, make_batches())
    ragged = [batch for n in (2, 3, 5, 7) for batch in make_batches(1, n)]

    def evaluate():
        with torch.compiler.set_stance("force_eager"):
            lk.evaluate(classifier, state, ragged)

    assert graphs_of(evaluate) == 0


def test_compiling_again_and_again_is_a_warning_with_the_cause():
    """A step that is compiled anew for each value warns once, and says what changed."""
    numbers = itertools.count()

    def counting(state, batch):
        return classifier(state, batch) * len(str(state.extras["number"]))

    state = state_of("mlp", "sgd")
    step = with_compile(dynamic=False)(counting)

    def go_on():
        for _ in range(7):
            state.extras["number"] = "x" * next(numbers)
            step(state, make_batches(1)[0])

    with pytest.warns(lk.CompileWarning, match="number") as caught:
        go_on()
    assert len([w for w in caught if "times again" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"scope": "loop"}, "'loop'"),
        ({"scope": "step", "blocks": nn.Linear}, "blocks"),
        ({"scope": "step", "fullgraph": True}, "fullgraph"),
    ],
)
def test_wrong_arguments_are_errors(arguments, found):
    """A scope that there is not, and settings of the other scope, are refused."""
    with pytest.raises(lk.UsageError, match=found):
        lk.with_compile(**arguments)


def test_a_closure_and_a_compiled_step_are_refused_together():
    """An optimizer that evaluates the loss itself cannot be one graph."""
    with pytest.raises(lk.CompositionError, match="with_closure"):
        lk.compose(lk.with_closure(), with_compile())(classifier)


def test_a_compiled_step_refuses_several_ranks():
    """Gradients that would silently not be averaged are an error in the first update."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(lk.CompositionError, match="2 ranks"):
            with_compile()(classifier)(state_of(), make_batches(1)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_functional_forms_are_of_torchs_own_optimizers_only():
    """A subclass may do something else in its step, so it keeps it."""

    class Mine(torch.optim.SGD):
        pass

    parameter = nn.Parameter(torch.zeros(2))
    assert functional_form(Mine([parameter], lr=0.1)) is None
    assert functional_form(torch.optim.SGD([parameter], lr=0.1)) is not None
    assert functional_form(torch.optim.SGD([nn.Parameter(torch.zeros(1) * 1j)], lr=0.1)) is None


def test_a_state_without_an_optimizers_state_waits_for_its_first_step():
    """make_state's optimizer makes its state itself, in a first update that is not compiled."""
    state, step = make_state(), with_compile()(classifier)
    assert graphs_of(lambda: step(state, make_batches(1)[0])) == 0
    assert len(state.optimizer.state) == 4
