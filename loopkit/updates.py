"""What iterates over the states of a training: runs, and what is put round them."""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Concatenate, ParamSpec

from loopkit.closing import Closing
from loopkit.errors import UsageError
from loopkit.state import TrainState

P = ParamSpec("P")


class Updates(Closing):
    """An iterator over states that can be closed, as `with` does at the end of its block."""

    def __init__(self, states: Generator[TrainState]) -> None:
        self._states = states

    def __iter__(self) -> Iterator[TrainState]:
        return self._states

    def __next__(self) -> TrainState:
        return next(self._states)

    def finish(self) -> TrainState:
        """Go on to the end, and return the state: a loop without a body.

        Raises:
            UsageError: For a run without a limit, which only a `break` ends; and where nothing
                says which state it is, as no update was left.
        """
        if getattr(self, "endless", False):
            raise UsageError(
                "run(...).finish()",
                "a run without an end",
                "max_epochs, max_steps or max_time; or a loop that breaks",
            )
        state: TrainState | None = getattr(self, "state", None)
        with self:
            for state in self:  # noqa: B007
                pass
        if state is None:
            raise UsageError(
                f"{type(self).__name__}.finish()",
                "no update, and an iterator without `.state`",
                "the state that you gave it",
            )
        return state

    def close(self) -> None:
        """End it where it is, and what it reads from."""
        self._states.close()


class Adapted(Updates):
    """The states of a run, with something done between them: what an adaptor returns.

    Adaptors compose, `progress(throughput(run(...)))`, and the outermost still tells what
    the run would. The generator it is given must not hold it in turn: that would be a cycle,
    and a loader's workers would outlive a `break` until the garbage collector finds it.

    Attributes:
        run: What the states come from.
    """

    def __init__(self, run: Iterable[TrainState], states: Generator[TrainState]) -> None:
        self.run = run
        super().__init__(states)

    @property
    def total_steps(self) -> int | None:
        """That of the run, if it has one."""
        return getattr(self.run, "total_steps", None)

    @property
    def state(self) -> TrainState | None:
        """That of the run, if it says which."""
        return getattr(self.run, "state", None)

    @property
    def endless(self) -> bool:
        """Whether nothing but a `break` ends it, as far as the run says."""
        return getattr(self.run, "endless", False)

    def close(self) -> None:
        """End it where it is, the run as well."""
        super().close()
        if hasattr(self.run, "close"):
            self.run.close()


def check_updates(call: str, run: object) -> None:
    """Refuse what is no iterable of states, such as a step.

    Raises:
        UsageError: If it cannot be iterated over.
    """
    if not isinstance(run, Iterable):
        raise UsageError(
            f"lk.{call}(...)",
            f"a {type(run).__name__}, which is nothing to iterate over",
            f"a run, or what was put round one: lk.{call}(lk.run(step, state, loader))",
        )


def adaptor(
    function: Callable[Concatenate[Iterable[TrainState], P], Generator[TrainState]],
) -> Callable[Concatenate[Iterable[TrainState], P], Adapted]:
    """Make a generator function over states an adaptor of runs, like `progress`.

    What it returns has `.finish()`, keeps `.total_steps`, `.state` and `.close()` of the run, and
    is a context manager, so that adaptors can be put round each other in any order.

    Args:
        function: Takes an iterable of states and settings, and yields each state.

    Example:
        >>> @adaptor
        ... def every_other(updates):
        ...     for state in updates:
        ...         if state.step % 2 == 0:
        ...             print("update", state.step)
        ...         yield state
        >>> [*every_other([])]
        []
    """

    @functools.wraps(function)
    def adapted(run: Iterable[TrainState], /, *args: P.args, **settings: P.kwargs) -> Adapted:
        check_updates(getattr(function, "__name__", "adaptor"), run)
        return Adapted(run, function(run, *args, **settings))

    return adapted
