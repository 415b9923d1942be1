"""The progress bar, on a real terminal and into a pipe."""

import io
import os
import pty
import re
import textwrap
import threading

import loopkit as lk
import pytest
import torch

from forked import STARTER
from problems import classifier, make_batches, make_state

SCRIPT = textwrap.dedent("""
    import time, torch, loopkit as lk
    model = torch.nn.Linear(2, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [torch.ones(4, 2)] * 10
    for state in lk.progress(lk.run(lambda s, x: s.model(x).mean(), state, data, max_epochs=3)):
        time.sleep(0.02)
""")


def test_into_a_pipe_it_writes_plain_lines():
    """Without a terminal each line says epoch, step, loss, speed and what is left."""
    done = STARTER.run(SCRIPT)
    lines = done.stderr.splitlines()
    assert re.match(r"epoch 0  step 1/30  loss -?[\d.]+ lr 0.1$", lines[0])
    assert re.match(
        r"epoch 2  step 30/30  loss -?[\d.]+ lr 0.1 [\d.]+ it/s [\d.]+ samples/s  eta 0:00:00$",
        lines[-1],
    )
    assert "\x1b" not in done.stderr
    assert done.stdout == ""


def on_a_terminal(script, *, columns=80):
    """What a script writes to a terminal, and the screens that it shows one after the other."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    ended = []

    def run():
        ended.append(
            STARTER.run(textwrap.dedent(script), env=env, terminal=os.ttyname(child)).returncode
        )
        os.close(child)

    running, shown = threading.Thread(target=run), b""
    running.start()
    try:
        while piece := os.read(parent, 65536):
            shown += piece
    except OSError:  # the other end was closed
        pass
    os.close(parent)
    running.join()
    assert ended == [0], shown.decode()
    return [*screens(shown.decode())]


def screens(text):
    """The screen after each escape sequence or line end: enough of a terminal for what is used."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            if part.endswith("A"):
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                lines[row] = ""
            continue
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
        yield [line.rstrip() for line in lines if line.strip()]


def test_on_a_terminal_of_80_columns_it_redraws_one_line():
    """On a terminal the bar stays on one line, with all it has to say, and ends complete."""
    shown = on_a_terminal(SCRIPT)
    assert all(len(screen) <= 1 and all(len(line) <= 80 for line in screen) for screen in shown)
    (last,) = shown[-1]
    assert re.fullmatch(
        r"epoch 2 ━+ 30/30 loss -?[\d.]+ lr 0.1 [\d.]+ it/s [\d.]+ samples/s eta 0:00:00", last
    )
    assert len({tuple(screen) for screen in shown}) > 2


MORE = SCRIPT.replace("lambda s, x: s.model(x).mean()", "step").replace("=3)", "=3), show=SHOW")
STEP = """
    def step(state, x):
        loss = state.model(x).mean()
        return {"loss": loss * 0 + 0.25, "accuracy": 0.125, "temperature": 0.5}
"""


@pytest.mark.parametrize(
    ("show", "columns", "kept"),
    [
        (["accuracy", "temperature"], 80, "loss 0.25 accuracy 0.125 temperature 0.5"),
        (["accuracy"], 60, "loss 0.25 accuracy 0.125"),
        ([], 60, "loss 0.25 lr 0.1"),
        ([], 45, "loss 0.25"),
    ],
)
def test_where_there_is_no_room_the_last_numbers_give_way(show, columns, kept):
    """Epoch, bar, count and time left stay whole on a narrow terminal; speeds go first."""
    shown = on_a_terminal(textwrap.dedent(STEP) + MORE.replace("SHOW", repr(show)), columns=columns)
    (last,) = shown[-1]
    assert len(last) <= columns
    assert re.fullmatch(rf"epoch 2 ━{{6,}} 30/30 {kept}(.*) eta 0:00:00", last), last
    assert "…" not in last
    assert "samples/s" not in last


EVALUATED = """
    import time, sys, torch, loopkit as lk
    from loguru import logger
    logger.remove()
    logger.add(sys.__stderr__, format="{message}")
    model = torch.nn.Linear(2, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data, val = [torch.ones(4, 2)] * 10, lk.bar([torch.ones(4, 2)] * 5, "val", every_s=0.01)
    def mean(state, x):
        time.sleep(0.02)
        return state.model(x).mean()
    log = lk.Log(FOLDER, lk.Console())
    for state in lk.progress(lk.run(mean, state, data, max_epochs=2), every_s=0.01):
        if state.epoch_end:
            log(state, **{"val/loss": lk.evaluate(mean, state, val)["loss"]})
            print("printed", state.epoch)
"""


def test_an_evaluation_has_its_bar_below_and_lines_go_above(tmp_path):
    """While it evaluates there are two bars; then one again, below what was logged and printed."""
    shown = on_a_terminal(f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(EVALUATED))
    nested = [screen for screen in shown if screen[-1:] and screen[-1].startswith("  val")]
    assert any("5/5" in screen[-1] for screen in nested)
    assert all(screen[-2].startswith("epoch") for screen in nested)
    final = shown[-1]
    assert [re.split(" +", line)[:2] for line in final] == [
        ["step", "10"], ["printed", "0"], ["step", "20"], ["printed", "1"], ["epoch", "1"],
    ]  # fmt: skip
    assert "20/20" in final[-1]
    assert all(len(line) <= 80 for screen in shown for line in screen)


def test_into_a_pipe_a_nested_bar_says_nothing_for_a_short_evaluation(tmp_path):
    """Lines of an evaluation come only where it takes long, and then they are set in."""
    script = f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(EVALUATED)
    done = STARTER.run(script)
    assert "val  " not in done.stderr.replace("val/loss", "")
    assert done.stdout == "printed 0\nprinted 1\n"


def test_a_bar_is_its_data_for_everyone_else():
    """Length, generators and repeated iteration are those of the loader."""
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None])
    loader = torch.utils.data.DataLoader(data, 3, shuffle=True, generator=generator)
    shown = lk.bar(loader, "val", file=io.StringIO())
    assert (len(shown), shown.generator, shown.batch_size) == (4, generator, 3)
    assert [len(batch[0]) for batch in shown] == [3, 3, 3, 1]

    def step(state, batch):
        return batch[0].mean()

    before = generator.get_state()
    assert lk.evaluate(step, make_state(), shown) == lk.evaluate(step, make_state(), loader)
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(TypeError):
        len(lk.bar(iter([1])))


def test_more_metrics_are_shown_by_name():
    """A number of the step's mapping; for a name that is not there, those that are."""

    def step(state, batch):
        numbers = {"accuracy": torch.tensor(0.25), "temperature": 0.75, "each": torch.ones(3)}
        return {"loss": classifier(state, batch), **numbers}

    def run():
        return lk.run(step, make_state(), make_batches(), max_epochs=1)

    file = io.StringIO()
    list(lk.progress(run(), show=["accuracy", "temperature"], file=file))
    assert "accuracy 0.25 temperature 0.75" in file.getvalue()
    with pytest.raises(lk.UsageError, match="'accuracy'") as caught:
        list(lk.progress(run(), show=["acuracy"], file=file))
    assert "'accuracy', 'loss', 'lr'" in caught.value.found
    with pytest.raises(lk.UsageError, match=r"a Tensor of shape \(3,\)") as caught:
        list(lk.progress(run(), show=["each"], file=file))
    assert "each.mean()" in caught.value.instead


def test_the_time_that_is_left_leaves_the_first_update_out(monkeypatch):
    """A first update of 1000 s, the others of 1 s: nine are left, 9 s are."""
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr("loopkit.observe.progress.time.monotonic", lambda: now[0])

    def step(state, batch):
        now[0] += 11.0 if state.step else 1000.0
        return classifier(state, batch)

    list(lk.progress(lk.run(step, make_state(), make_batches(11), max_epochs=1), file=file))
    second = file.getvalue().splitlines()[1]
    assert "step 2/11" in second
    assert second.endswith(f"eta 0:0{9 * 11 // 60}:{9 * 11 % 60:02d}")


def test_it_does_not_wait_for_the_device():
    """Numbers that have not arrived are shown later; only those of the last update are awaited."""
    from loopkit.observe import progress as module

    class Busy(module.Fetched):
        def ready(self):
            return False

    file, fetch = io.StringIO(), module.fetch
    module.fetch = lambda call, values: Busy(fetch(call, values).known)
    try:
        list(lk.progress(lk.run(classifier, make_state(), make_batches(), max_epochs=1), file=file))
    finally:
        module.fetch = fetch
    assert [line.split("  ")[1] for line in file.getvalue().splitlines()] == ["step 7/7"]


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
