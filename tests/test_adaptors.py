"""What is put round a run: composes in any order, and ends the run with itself."""

import io
import itertools

import loopkit as lk
import pytest

from problems import classifier, make_batches, make_state


@lk.adaptor
def noted(updates, notes):
    """A user's own."""
    for state in updates:
        notes.append(state.step)
        yield state


def adaptors(folder):
    checkpoints = lk.Checkpointer(folder / "saved", every=3)
    log = lk.Log(folder / "log")
    return {
        "progress": lambda run: lk.progress(run, file=io.StringIO()),
        "throughput": lk.throughput,
        "timing": lk.Timing(),
        "profile": lambda run: lk.profile(run, folder / "profile", kind="python"),
        "checkpoints": checkpoints.wrap,
        "preemptible": lambda run: lk.preemptible(run, checkpoints),
        "log": lambda run: log.wrap(run, every=2),
        "own": lambda run: noted(run, []),
    }


PAIRS = list(
    itertools.permutations(
        ["progress", "throughput", "timing", "profile", "checkpoints", "preemptible", "log", "own"],
        2,
    )
)


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_adaptors_compose_in_any_order(tmp_path, outer, inner):
    """The outermost passes each state once, tells the run's total and state, and closes it."""
    made, state = adaptors(tmp_path), make_state()
    run = lk.run(classifier, state, make_batches(), max_epochs=2)
    with made[outer](made[inner](run)) as updates:
        assert (updates.total_steps, updates.state) == (14, state)
        assert [s.step for s in itertools.islice(updates, 5)] == [1, 2, 3, 4, 5]
    assert next(run, None) is None
    assert next(updates, None) is None
    assert state.step == 5


def test_a_break_ends_what_is_within():
    """Without `with`, a break lets go of the whole chain: each generator is closed."""
    ended = []

    @lk.adaptor
    def noting(updates):
        try:
            yield from updates
        finally:
            ended.append(True)

    for state in lk.throughput(
        noting(lk.run(classifier, make_state(), make_batches(), max_steps=5))
    ):
        if state.step == 2:
            break
    assert ended == [True]


def test_an_adaptor_of_ones_own_takes_settings_and_keeps_its_name():
    """It is called with the run first; its docstring is the function's."""
    notes = []
    list(noted(lk.run(classifier, make_state(), make_batches(3), max_epochs=1), notes=notes))
    assert notes == [1, 2, 3]
    assert (noted.__name__, noted.__doc__) == ("noted", "A user's own.")


@pytest.mark.parametrize("name", ["progress", "throughput", "profile", "log", "own"])
def test_a_step_where_a_run_is_wanted_is_an_error_that_teaches(tmp_path, name):
    """It says to run the step first."""
    with pytest.raises(lk.UsageError, match=r"lk\.run\(step, state, loader\)"):
        adaptors(tmp_path)[name](lk.train_step(classifier))
