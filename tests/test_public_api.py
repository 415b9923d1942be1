"""The public names: what they are, that their docstrings run, and that their names stay."""

import doctest
import importlib
import inspect
import pkgutil

import loopkit as lk
import pytest

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(lk.__path__, prefix="loopkit.")
]

# The contract: these names stay. What is new is added here as well as in loopkit.__all__.
CONTRACT = """
TrainState Step Window Run train_step eval_step compose wrap own explain run evaluate predict
windows with_amp with_grad_accum with_clip with_clip_value with_schedule with_ema ema_weights
with_nonfinite with_anomaly_detection with_closure seed_everything device to_device prefetch
Transform Forward Backward create_optimizer configure_optimizer param_groups CombinedOptimizer
constant warmup linear cosine polynomial cosine_with_restarts inverse_sqrt wsd plot_schedule
Log Sink Record CSV JSONL TensorBoard WandB MLflow Console bar adaptor throughput profile Timing
summary plot learning_rates device_stats inference
EarlyStopping every Moment fast_dev_run overfit sanity_check find_lr find_batch_size detect_overflow
sharded Uneven distributed DDP FSDP TensorParallel launch agree reduce RankError
seeded group_by_length pad_collate collect
Checkpointer CheckpointOptions load_best export load_weights preemptible Preempted
with_sam with_swa update_bn with_freeze with_grad_noise with_neftune with_activation_checkpointing
with_activation_offload with_optimizer_in_backward with_microbatch with_precision
""".split()


def test_the_names_of_the_contract_are_there():
    """Each name that users, tests and guides rely on is public."""
    assert set(CONTRACT) <= set(lk.__all__)
    assert len({*lk.__all__}) == len(lk.__all__)
    assert all(hasattr(lk, name) for name in lk.__all__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module):
    """Each example in a docstring gives what it says."""
    assert doctest.testmod(module).failed == 0


def documented():
    return [
        (name, value)
        for name in lk.__all__
        if inspect.isfunction(value := getattr(lk, name)) or inspect.isclass(value)
    ]


@pytest.mark.parametrize(("name", "value"), documented())
def test_public_docstrings_give_promise_arguments_and_example(name, value):
    """A public function or class says what it promises, what it takes, and shows a use."""
    text = inspect.getdoc(value)
    assert text
    if issubclass(value, Exception) if inspect.isclass(value) else False:
        return
    parameters = [
        p.name
        for p in inspect.signature(value).parameters.values()
        if p.name not in {"self", "values", "layers", "owners", "extras", "decorators"}
    ]
    missing = [p for p in parameters if f"{p}:" not in text] if "Args:" in text else []
    assert not missing, f"{name} does not say what {missing} are"
    assert "Example:" in text, name
