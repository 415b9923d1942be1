"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable

from loopkit.checkpoint.every import Every
from loopkit.state import TrainState
from loopkit.updates import Adapted


class Saving(Adapted):
    """The states of a run, which is saved on the way; made by `Checkpointer.wrap`."""

    def __init__(
        self,
        run: Iterable[TrainState],
        every: Every,
        save: Callable[[TrainState], object],
        wait: Callable[[], object],
    ) -> None:
        super().__init__(run, _saved(run, every, save, wait))


def _saved(
    run: Iterable[TrainState],
    every: Every,
    save: Callable[[TrainState], object],
    wait: Callable[[], object],
) -> Generator[TrainState]:
    last = None
    for last in run:
        yield last
        if every.is_due(last):  # after the loop's body, which belongs to the update
            save(last)
    if last is not None:
        save(last)
        wait()
