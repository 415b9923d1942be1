"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable
from typing import Any

from loopkit.errors import CheckpointError
from loopkit.every import Every
from loopkit.ranks import Ranks
from loopkit.state import TrainState
from loopkit.updates import Updates


class Saving(Updates):
    """The states of a run, which is saved on the way; made by `Checkpointer.wrap`.

    Attributes:
        run: What the states come from.
    """

    def __init__(
        self,
        run: Iterable[TrainState],
        every: Every,
        save: Callable[[TrainState], object],
        wait: Callable[[], object],
    ) -> None:
        self.run = run
        super().__init__(_saved(run, every, save, wait))

    @property
    def total_steps(self) -> int | None:
        """That of the run, if it has one."""
        return getattr(self.run, "total_steps", None)

    def close(self) -> None:
        """End it where it is, the run as well."""
        super().close()
        if hasattr(self.run, "close"):
            self.run.close()


# A function, as a generator that held its `Saving` would be a cycle: data workers would
# outlive a `break` until the garbage collector finds it.
def _saved(
    run: Iterable[TrainState],
    every: Every,
    save: Callable[[TrainState], object],
    wait: Callable[[], object],
) -> Generator[TrainState]:
    last = None
    for last in run:
        yield last
        if every(last):  # after the loop's body, which belongs to the update
            save(last)
    if last is not None:
        save(last)
        wait()


def together(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """Do on the first rank what only one process may, and give all ranks what it gave.

    Raises:
        CheckpointError: On the other ranks, if the first one failed; there, its own error.
    """
    if ranks.alone:
        return action()
    result, failure = None, None
    if ranks.is_first:
        try:
            result = action()
        except Exception as error:
            ranks.from_first((None, f"{type(error).__name__}: {error}"))
            raise
    result, failure = ranks.from_first((result, failure))
    if failure is not None:
        raise CheckpointError(
            "a checkpoint of several ranks", f"that rank 0 failed: {failure}", "as that error says"
        )
    return result
