"""A run that saves itself between updates."""

from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType

from loopkit.checkpoint.every import Every
from loopkit.state import TrainState


class Saving:
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
        self.run, self._every, self._save, self._wait = run, every, save, wait
        self._iterator = self._states()

    def __iter__(self) -> Iterator[TrainState]:
        return self._iterator

    def __next__(self) -> TrainState:
        return next(self._iterator)

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def total_steps(self) -> int | None:
        """That of the run, if it has one."""
        return getattr(self.run, "total_steps", None)

    def close(self) -> None:
        """End it where it is, the run as well."""
        self._iterator.close()
        if hasattr(self.run, "close"):
            self.run.close()

    def _states(self) -> Generator[TrainState]:
        last = None
        for last in self.run:
            yield last
            if self._every.is_due(last):  # after the loop's body, which belongs to the update
                self._save(last)
        if last is not None:
            self._save(last)
            self._wait()
