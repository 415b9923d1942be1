"""What griffe has to know to read the package's docstrings, and the signatures of attrs classes."""

import importlib
import inspect
import re
from typing import Any

import griffe

# "Example:" with a doctest below; griffe's name for the section is "Examples:".
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Loopkit(griffe.Extension):
    """Applied to each object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Name the section of examples as griffe does."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a class that attrs writes `__init__` for its parameters."""
        if not any("attrs." in str(decorator.value) for decorator in cls.decorators):
            return
        found = getattr(importlib.import_module(cls.module.canonical_path), cls.name)
        if not found.__attrs_props__.added_init if hasattr(found, "__attrs_props__") else False:
            return
        init = griffe.Function("__init__", parent=cls, returns="None")
        init.parameters = griffe.Parameters(griffe.Parameter("self", kind=None))
        for parameter in inspect.signature(found).parameters.values():
            init.parameters.add(parameter_of(cls, parameter))
        cls.set_member("__init__", init)


def parameter_of(cls: griffe.Class, found: inspect.Parameter) -> griffe.Parameter:
    """A parameter with the annotation that the class's source has."""
    members = {**cls.all_members}
    field = members.get(found.name) or members.get(f"_{found.name}")
    default = None if found.default is inspect.Parameter.empty else repr(found.default)
    return griffe.Parameter(
        found.name,
        annotation=getattr(field, "annotation", None),
        kind=griffe.ParameterKind(found.kind.description),
        default="..." if default == "NOTHING" else default,
    )
