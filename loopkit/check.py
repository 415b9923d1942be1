"""Checking the settings of a decorator when it is written."""

import difflib
import math
from collections.abc import Iterable

from loopkit.errors import UsageError


def positive(call: str, name: str, value: object) -> float:
    """The value, if it is a number above zero (infinity included).

    Raises:
        UsageError: If it is not.

    Example:
        >>> positive("with_clip(2)", "max_norm", 2)
        2.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UsageError(
            call, f"{name} = {value!r:.60} ({type(value).__name__})", f"{name}: a number above 0"
        )
    return float(value)


def fraction(call: str, name: str, value: object) -> float:
    """The value, if it is a number from 0 to 1.

    Raises:
        UsageError: If it is not.

    Example:
        >>> fraction("with_ema(0.9)", "decay", 0.9)
        0.9
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1:
        raise UsageError(
            call,
            f"{name} = {value!r:.60} ({type(value).__name__})",
            f"{name}: a number from 0 to 1",
        )
    return float(number)


def at_least_one(call: str, name: str, value: object) -> int:
    """The value, if it is a whole number of 1 or more.

    Raises:
        UsageError: If it is not.

    Example:
        >>> at_least_one("with_grad_accum(4)", "n", 4)
        4
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(
            call, f"{name} = {value!r:.60} ({type(value).__name__})", f"{name}: an int of 1 or more"
        )
    return value


def one_of(call: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices.

    Raises:
        UsageError: If it is not.

    Example:
        >>> one_of("f('a')", "letter", "a", ("a", "b"))
        'a'
    """
    if value not in choices:
        raise UsageError(
            call, f"{name} = {value!r:.60}", f"{name}: {' or '.join(map(repr, choices))}"
        )
    return str(value)


def near(word: str, known: Iterable[str]) -> str:
    """What to write instead of `word`: the known word that is nearest, then all of them.

    Example:
        >>> near("admw", ("adam", "adamw", "sgd"))
        "'adamw'; known are adam, adamw, sgd"
        >>> near("x", ("adam", "sgd"))
        'one of adam, sgd'
    """
    choices = sorted(known)
    every = ", ".join(choices)
    close = difflib.get_close_matches(word.lower(), choices, n=1)
    return f"{close[0]!r}; known are {every}" if close else f"one of {every}"


NO_SCORE = "; of a step function's mapping numbers and 0-d tensors are scores, a vector is none"
"""What an error says where a score was asked for that `evaluate` did not return."""
