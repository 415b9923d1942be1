"""One line of a log, and what may be written into it."""

import dataclasses
import math
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import attrs

Value = bool | int | float | str

REDACTED = "[redacted]"
_NOT_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}

# Words of a name behind which text is kept out, whatever it looks like; behind the second, numbers.
_SECRET_TEXT = {"token", "tokens", "key", "keys", "apikey", "auth", "authorization", "bearer"}
_SECRET = {"secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential"}
_SECRET |= {"credentials"}
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")
# What tokens of widely used services look like, wherever they stand in a text.
_TOKENS = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA)[A-Za-z0-9_\-]{12,}"
    r"|\beyJ[\w\-]{4,}\.[\w\-]{4,}\.[\w\-]+"
    r"|(?i:\bbearer\s+)\S{8,}"
)
# password=..., api_key: ... within a text
_ASSIGNED = re.compile(
    r"(?i)(\b[\w\-]*(?:token|secret|password|passwd|pwd|api[_-]?key|access[_-]?key|credentials?)"
    r"[\"']?\s*[=:]\s*[\"']?)([^\s\"',;&]+)"
)


@attrs.frozen
class Record:
    """What was logged at one update.

    Attributes:
        step: Updates so far.
        epoch: The epoch it belongs to.
        samples: Samples so far.
        time: When it was logged, in seconds since 1970.
        values: Numbers and text by name; all on the host, escaped and redacted.

    Example:
        >>> Record(step=10, epoch=0, samples=320, time=0.0, values={"loss": 0.5}).values
        {'loss': 0.5}
    """

    step: int
    epoch: int
    samples: int
    time: float
    values: Mapping[str, Value]

    def numbers(self) -> dict[str, float]:
        """Those of the values that are numbers."""
        return {k: v for k, v in self.values.items() if not isinstance(v, str)}

    def texts(self) -> dict[str, str]:
        """Those of the values that are text."""
        return {k: v for k, v in self.values.items() if isinstance(v, str)}


def escaped(text: str) -> str:
    r"""The text on one line: what is not printable, or reorders text, is spelled out.

    Example:
        >>> print(escaped("loss\n\x1b[31m"))
        loss\n\x1b[31m
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def spelled(value: Value) -> Value:
    """A number that JSON does not know as the text that `float` reads; the rest as it is.

    Example:
        >>> spelled(float("nan")), spelled(0.5)
        ('NaN', 0.5)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE.get(value, "NaN")
    return value


def redacted(name: str, value: Any) -> Any:
    """The value, less what is or looks like a secret.

    Text under a name that says so (`api_key`, `token`, `password`) goes whole; elsewhere
    what has the form of a token, and the user and password of a URL. A net, not a proof.

    Example:
        >>> redacted("api_key", "abc"), redacted("url", "https://me:pw@host/x")
        ('[redacted]', 'https://[redacted]@host/x')
        >>> redacted("tokens", 512), redacted("tokenizer", "bpe")
        (512, 'bpe')
    """
    words = {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    whole = {re.sub(r"[^a-z]", "", name.lower())}
    if words & _SECRET or (isinstance(value, str) and (words | whole) & _SECRET_TEXT):
        return REDACTED
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """A text, less what looks like a secret in it.

    Example:
        >>> redacted_text("login failed: password=hunter2 at ftp://a:b@host")
        'login failed: password=[redacted] at ftp://[redacted]@host'
    """
    text = _USERINFO.sub(f"{REDACTED}@", text)
    return _ASSIGNED.sub(rf"\1{REDACTED}", _TOKENS.sub(REDACTED, text))


def clean(values: Mapping[str, Any]) -> dict[str, Value]:
    r"""Values as a record holds them: escaped and redacted, names too.

    Example:
        >>> clean({"note": "a\nb", "token": "x"})
        {'note': 'a\\nb', 'token': '[redacted]'}
    """
    return {
        escaped(redacted_text(name)): escaped(found)
        if isinstance(found := redacted(name, value), str)
        else found
        for name, value in values.items()
    }


def flat(settings: Any, prefix: str = "") -> dict[str, Value]:
    """Settings as one level of names, numbers and text, cleaned.

    Args:
        settings: A mapping, a namespace, or an attrs or data class; nested as you like.
        prefix: What the names start with.

    Example:
        >>> flat({"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}, "hub_token": "x"})
        {'optimizer/lr': 0.1, 'optimizer/betas': '(0.9, 0.99)', 'hub_token': '[redacted]'}
    """
    found: dict[str, Value] = {}
    for name, value in _items(settings).items():
        plain = value if isinstance(value, bool | int | float | str) else str(value)
        if value is os.environ or redacted(str(name), plain) == REDACTED:
            found[escaped(f"{prefix}{name}")] = REDACTED
        elif inner := _items(value):
            found |= flat(inner, f"{prefix}{name}/")
        else:
            found |= clean({f"{prefix}{name}": plain})
    return found


def _items(settings: Any) -> Mapping[str, Any]:
    if isinstance(settings, Mapping):
        return settings
    if attrs.has(type(settings)):
        return {f.name: getattr(settings, f.name) for f in attrs.fields(type(settings))}
    if dataclasses.is_dataclass(settings):
        return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return vars(settings) if isinstance(settings, Namespace | SimpleNamespace) else {}
