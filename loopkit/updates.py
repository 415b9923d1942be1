"""What iterates over the states of a training: iterator and context manager."""

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Self

from loopkit.state import TrainState


class Updates:
    """An iterator over states that can be closed, as `with` does at the end of its block."""

    def __init__(self, states: Generator[TrainState]) -> None:
        self._states = states

    def __iter__(self) -> Iterator[TrainState]:
        return self._states

    def __next__(self) -> TrainState:
        return next(self._states)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it where it is, and what it reads from."""
        self._states.close()
