"""What all tests share."""

import gc
import os

# Before torch is imported, and for all processes that tests start: their tensors are so small that
# a second thread only waits for its turn, on a busy machine ten times as long as there is work.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """What became of the processes that a test has made to fail, and after how many seconds."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    rows = [(r.nodeid.split("::")[-1], dict(r.user_properties)) for r in reports]
    rows = [(name, said) for name, said in rows if "seconds" in said]
    if rows:
        terminalreporter.section("faults: seconds to the end, and what was found then")
    for name, said in rows:
        terminalreporter.write_line(f"{said['seconds']:>6}  {name}: {said.get('outcome', '')}")
