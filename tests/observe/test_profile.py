"""Profiles: traces that load, of the updates that were asked for."""

import json

import loopkit as lk
import pytest
import torch

from problems import classifier, make_batches, make_state


def updates(count=8, function=classifier):
    return lk.run(function, make_state(), make_batches(count), max_epochs=1)


def spans(path, name):
    events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e.get("name") == name and e.get("ph") == "X"]


def marked(state, batch):
    with torch.profiler.record_function("our step"):
        return classifier(state, batch)


def test_the_trace_holds_the_updates_that_were_asked_for(tmp_path):
    """A Chrome trace, read as JSON: each active update once, with its operations."""
    found = lk.profile(updates(function=marked), tmp_path, wait=2, warmup=1, active=3)
    assert [state.step for state in found] == [*range(1, 9)]
    (path,) = found.traces
    assert len(spans(path, "our step")) == 3
    assert spans(path, "aten::addmm")
    assert "aten::addmm" in (tmp_path / "profile.txt").read_text()
    assert "our step" in found.table


def test_cycles_repeat_and_an_early_break_writes_what_there_is(tmp_path):
    """Two cycles make two traces; a break within the third writes it as far as it came."""
    found = lk.profile(updates(20, marked), tmp_path, wait=1, warmup=1, active=2, repeat=0)
    with found:
        for state in found:
            if state.step == 11:
                break
    assert [len(spans(path, "our step")) for path in found.traces] == [2, 2, 1]


def test_memory_and_stacks_are_torchs_own_settings(tmp_path):
    """Settings go to torch.profiler.profile."""
    found = lk.profile(updates(), tmp_path, profile_memory=True)
    list(found)
    assert "CPU Mem" in found.table


def test_the_python_profiler_lists_functions_without_the_loops_body(tmp_path):
    """The step function is in the table as often as it was called; the loop's body is not."""

    def body():
        return sum(range(1000))

    found = lk.profile(updates(5), tmp_path, kind="python")
    for _ in found:
        body()
    (line,) = [line for line in found.table.splitlines() if "(classifier)" in line]
    assert line.split()[0] == "5"
    assert "(body)" not in found.table
    assert (tmp_path / "profile.txt").read_text() == found.table + "\n"


def test_profiling_changes_no_bit(tmp_path):
    """The weights are those of the run that is not profiled."""
    plain, profiled = make_state("dropout"), make_state("dropout")
    torch.manual_seed(3)
    list(lk.run(classifier, plain, make_batches(), max_epochs=1))
    torch.manual_seed(3)
    list(lk.profile(lk.run(classifier, profiled, make_batches(), max_epochs=1), tmp_path))
    assert all(map(torch.equal, plain.model.parameters(), profiled.model.parameters()))


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"kind": "simple"}, "'simple'"), ({"active": 0}, "active = 0"), ({"wait": -1}, "wait = -1"),
     ({"kind": "python", "with_stack": True}, "with_stack")],
)  # fmt: skip
def test_a_wrong_use_is_an_error_that_teaches(tmp_path, settings, found):
    """It names what was found, at once."""
    with pytest.raises(lk.UsageError) as caught:
        lk.profile([], tmp_path, **settings)
    assert found in str(caught.value)
