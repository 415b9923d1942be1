"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable

from loopkit.every import Every
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
