"""The progress bar, on a real terminal and into a pipe."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import loopkit as lk
import pytest

from problems import classifier, make_batches, make_state

SCRIPT = textwrap.dedent("""
    import time, torch, loopkit as lk
    model = torch.nn.Linear(2, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [torch.ones(4, 2)] * 10
    for state in lk.progress(lk.run(lambda s, x: s.model(x).mean(), state, data, max_epochs=3)):
        time.sleep(0.02)
""")
COMMAND = [sys.executable, "-W", "error", "-c", SCRIPT]


def test_into_a_pipe_it_writes_plain_lines():
    """Without a terminal each line says epoch, step, loss, speed and what is left."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert re.match(r"epoch 0  step 1/30  loss -?[\d.]+ lr 0.1$", lines[0])
    assert re.match(
        r"epoch \d  step 30/30  loss -?[\d.]+ lr 0.1 [\d.]+ it/s [\d.]+ samples/s  eta 0:00:00$",
        lines[-1],
    )
    assert "\x1b" not in done.stderr
    assert done.stdout == ""


def test_on_a_terminal_of_80_columns_it_redraws_one_line():
    """On a terminal the bar stays on one line and ends complete."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        COMMAND, stderr=child, stdout=child,
        env={**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(child)
    shown = b""
    try:
        while piece := os.read(parent, 65536):
            shown += piece
    except OSError:  # the other end was closed
        pass
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    assert "30/30" in lines[-1]
    assert "it/s" in lines[-1]
    assert len(lines) > 2


def test_the_states_pass_through_and_a_break_closes_the_run():
    """Progress yields what run yields, and ends its run with the loop."""
    state = make_state()
    updates = lk.run(classifier, state, make_batches(), max_epochs=1)
    for passed in lk.progress(updates, file=io.StringIO()):
        assert passed is state
        if state.step == 3:
            break
    assert state.step == 3
    assert list(lk.progress([])) == []


def test_a_wrong_interval_is_an_error_at_once():
    """An interval that is not above 0 is refused when it is written."""
    with pytest.raises(lk.UsageError, match="every_s"):
        lk.progress([], every_s=0)
