"""What all tests share."""

import pytest
import torch


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
