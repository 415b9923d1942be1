"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable
from typing import Any

from loopkit.errors import CheckpointError
from loopkit.every import Every, Moment
from loopkit.ranks import Ranks
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
