"""What a check found, in words."""

import attrs

LEVELS = ("ok", "note", "LOOK", "WRONG")


@attrs.frozen
class Finding:
    """What one check found.

    Attributes:
        level: `"ok"`; `"note"`, what could not be checked; `"LOOK"`, what may be meant so;
            `"WRONG"`, what is a mistake.
        about: What was checked.
        words: What was found, and what to do about it.
    """

    level: str
    about: str
    words: str


def ok(about: str, words: str) -> Finding:
    """All is well."""
    return Finding("ok", about, words)


def note(about: str, words: str) -> Finding:
    """Nothing can be said."""
    return Finding("note", about, words)


def look(about: str, words: str) -> Finding:
    """It may be meant so."""
    return Finding("LOOK", about, words)


def wrong(about: str, words: str) -> Finding:
    """It is a mistake."""
    return Finding("WRONG", about, words)
