"""What is put round a run: composes in any order, and ends the run with itself."""

import io
import itertools

import loopkit as lk
import pytest
from loopkit.testing import assert_bitwise_equal

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


@pytest.mark.parametrize(("outer", "inner"), PAIRS[::5])
def test_finish_drives_any_chain_to_its_end(tmp_path, outer, inner):
    """It gives the run's state after all updates, and again where none is left to do."""
    made, state, plain, data = adaptors(tmp_path), make_state(), make_state(), make_batches()
    for _ in range(2):
        run = made[outer](made[inner](lk.run(classifier, state, data, max_epochs=2)))
        assert run.finish() is state
    assert lk.run(classifier, plain, make_batches(), max_epochs=2).finish() is plain
    assert_bitwise_equal(state.model.state_dict(), plain.model.state_dict())
    assert (state.step, plain.step) == (14, 14)


def test_finish_goes_on_from_where_the_run_is_and_ends_its_data_when_it_fails():
    """After some updates of a loop it does the rest; an error ends what is read from."""
    run = lk.run(classifier, make_state(), make_batches(), max_epochs=1)
    assert next(run).step == 1
    assert run.finish().step == 7

    ended = []

    def batches():
        try:
            yield from [*make_batches(3), None]
        finally:
            ended.append(True)

    with pytest.raises(TypeError):
        lk.throughput(lk.run(classifier, make_state(), batches(), max_epochs=1)).finish()
    assert ended == [True]


def test_finish_of_an_iterator_without_a_state_gives_the_last_one_it_yields():
    """An adaptor of any generator has it, as long as there is an update."""
    state = make_state()
    run = lk.run(classifier, state, make_batches(2), max_epochs=1)
    assert noted((s for s in run), []).finish() is state
    with pytest.raises(lk.UsageError, match="no update"):
        noted(iter(()), []).finish()


@pytest.mark.parametrize("wrapped", [lk.throughput, lambda run: run])
def test_to_finish_what_has_no_end_is_an_error(wrapped):
    """Without a limit only a break ends a run; an iterator does, which can be read once."""
    state = make_state()
    with pytest.raises(lk.UsageError, match=r"without an end\n.*max_epochs, max_steps or max_time"):
        wrapped(lk.run(classifier, state, make_batches())).finish()
    assert state.step == 0
    assert wrapped(lk.run(classifier, state, iter(make_batches(3)))).finish().step == 3
    assert wrapped(lk.run(classifier, state, make_batches(3), max_time=0.05)).finish() is state


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
