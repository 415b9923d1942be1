"""examples/distributed.py, by python and on two ranks."""

import importlib.util
from pathlib import Path

from pool import POOL

PATH = Path(__file__).parents[2] / "examples" / "distributed.py"


def trained(strategy, epochs):
    """The scores of the example, as a script of its own would get them."""
    spec = importlib.util.spec_from_file_location("distributed_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(strategy, epochs=epochs, batch_size=32)


def test_one_process_learns_digits():
    """Two epochs on one process find at least four digits in five."""
    assert trained("auto", 2)["accuracy"] > 0.8


def test_two_ranks_learn_as_well_and_agree():
    """The same script on two ranks, sharded: equal scores on both."""
    first, second = POOL.run(2, trained, "fsdp", 3)
    assert first == second
    assert first["accuracy"] > 0.7
