"""Packages that are imported where they are used, because not everyone needs them."""

import importlib
from types import ModuleType

from loopkit.errors import MissingExtraError


def extra(module: str, *, package: str, wrote: str) -> ModuleType:
    """Import a module of a package that loopkit does not depend on.

    Args:
        module: What to import.
        package: What pip calls it.
        wrote: The user's call that needs it.

    Raises:
        MissingExtraError: If it cannot be imported.

    Example:
        >>> extra("json", package="json", wrote="f()").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            wrote, f"that {module} cannot be imported: {error}", f"pip install {package}, first"
        ) from error
