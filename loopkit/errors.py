"""The errors: each says what was written, what was found, and what to write instead."""


class LoopkitError(Exception):
    """The base of every error that loopkit raises on purpose.

    The message has three parts, each of them required, so that no error can be
    raised without its remedy.

    Args:
        wrote: What the user wrote, as code where that is possible.
        found: What was found there, with its value.
        instead: What to write instead.

    Example:
        >>> print(LoopkitError("with_clip(nan)", "max_norm = nan", "with_clip(1.0)"))
        with_clip(nan): found max_norm = nan
          write instead: with_clip(1.0)
    """

    def __init__(self, wrote: str, found: str, instead: str) -> None:
        super().__init__(wrote, found, instead)
        self.wrote, self.found, self.instead = wrote, found, instead

    def __str__(self) -> str:
        return f"{self.wrote}: found {self.found}\n  write instead: {self.instead}"


class UsageError(LoopkitError, ValueError):
    """A value or a type that cannot be right, found when it was given."""


class CompositionError(LoopkitError, TypeError):
    """Features, steps or states that cannot be put together."""


class OutputError(LoopkitError, ValueError):
    """A step function returned something that cannot be trained on."""


class DataError(LoopkitError, ValueError):
    """The data is empty, ran out, or is not what the step takes."""


class NonFiniteError(LoopkitError, ArithmeticError):
    """A loss or a gradient is not finite, and `with_nonfinite("raise")` was asked for."""


class RankError(LoopkitError, RuntimeError):
    """This process cannot go on, because another one that trains with it failed."""


class CheckpointError(LoopkitError, RuntimeError):
    """A checkpoint cannot be written, found, or used for this state."""


class DamageError(CheckpointError):
    """A checkpoint on disk is not what was written."""


class StorageError(CheckpointError, OSError):
    """An object store did not answer, or refused: not the same as that nothing is there."""


class CheckpointWarning(UserWarning):
    """Training goes on, but not from where, or not with the copies, that one would expect."""


class MissingExtraError(LoopkitError, ImportError):
    """A package that a feature needs, and loopkit does not, is not installed."""


class Preempted(SystemExit):
    """A run was asked to stop, and its last state is saved: the end of the process, unless caught.

    As a `SystemExit` it passes `except Exception`, runs every `finally`, and shows no traceback.

    Args:
        signum: The signal that asked for it; SIGALRM (14) where it was a time limit.

    Attributes:
        code: What the process ends with: 128 + signum.

    Example:
        >>> Preempted(15).code
        143
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum
