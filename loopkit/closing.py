"""What is closed at the end of a `with` block."""

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """A context manager that gives itself, and is closed at the end of the block."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it where it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
