"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable

from loopkit.every import Every, Moment
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
        begun: Moment,
    ) -> None:
        super().__init__(run, _saved(run, every, save, wait, begun))


def _saved(
    run: Iterable[TrainState],
    every: Every,
    save: Callable[[TrainState], object],
    wait: Callable[[], object],
    since: Moment,
) -> Generator[TrainState]:
    last = getattr(run, "state", None)
    since = since if last is None else Moment.of(last)
    last = None
    for last in run:
        yield last
        if every(last, since):  # after the loop's body, which belongs to the update
            save(last)
        since = Moment.of(last)  # `run` may yield once for many updates
    if last is not None:
        save(last)
        wait()
