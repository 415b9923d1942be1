"""What is rarely changed about checkpoints."""

from typing import Any

import attrs

from loopkit.check import at_least_one, one_of
from loopkit.checkpoint.disk import Disk


def _one_of(*choices: str) -> Any:
    def check(options: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
        call = f"CheckpointOptions({attribute.name}={value!r})"
        one_of(call, attribute.name, value, choices)

    return check


def _at_least_one(options: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    at_least_one(f"CheckpointOptions({attribute.name}={value!r})", attribute.name, value)


@attrs.frozen(kw_only=True)
class CheckpointOptions:
    """Rare settings of a `Checkpointer`.

    Args:
        on_error: What a save that failed does (a full disk): `"raise"` at the next save, wait
            or close; or `"warn"` there, and go on.
        max_failures: With `"warn"`, how many saves in a row may fail before one raises.
        when_busy: A save while another is being written: `"wait"` for it, or `"drop"` this one.
        sha256: Write sha256 beside crc32 and check it. Whoever can change the files can
            change their checksums: keep the manifest's own elsewhere if that matters.
        private: Make folders that only their owner may open (0700), whatever the umask says.
        owner: Whose checkpoints are restored: `"any"`; or only those that belong to this user
            (or root) and that no other may change, with `"warn"` or `"refuse"` for the rest.
        allow_nonfinite: Save parameters that are not finite, too.
        frozen: Save parameters that do not require gradients, too. Without them a checkpoint of
            adapters is small; it restores into a model with the very same ones frozen, which
            keep the values that they have there: those that it was pretrained with.
        disk: What writes; for other kinds of storage, and for tests.

    Raises:
        UsageError: For a policy that is not there.

    Example:
        >>> CheckpointOptions(on_error="warn").when_busy
        'wait'
    """

    on_error: str = attrs.field(default="raise", validator=_one_of("raise", "warn"))
    max_failures: int = attrs.field(default=10, validator=_at_least_one)
    when_busy: str = attrs.field(default="wait", validator=_one_of("wait", "drop"))
    sha256: bool = False
    private: bool = False
    owner: str = attrs.field(default="any", validator=_one_of("any", "warn", "refuse"))
    allow_nonfinite: bool = False
    frozen: bool = True
    disk: Disk = attrs.field(factory=Disk, repr=False)
