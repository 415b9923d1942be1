"""Graphs: a function that torch compiles apart from others, backward passes included."""

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as entries_of
from torch._dynamo import config, eval_frame, exc, utils

EXPECTED = 3  # graphs of one function: the first, one for other shapes, one for other values


class CompileWarning(UserWarning):
    """Something runs compiled, but not as fast as one would expect."""


_WHILE_TRACING = {
    "trace_autograd_ops": True,  # backward passes enter the graph
    "record_pre_graph_bytecode_in_traces": False,  # for profiles; 8 us of each call
}
_BEFORE: dict[str, Any] = {}  # torch's settings, while they are others for one of our functions


# Dynamo calls such a function once, when it traces, and takes what it returned for a constant:
# so the setting costs nothing in the calls that run what is compiled already.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def allow_backward() -> bool:
    """Let dynamo take a backward pass into its graph; called in what a `Program` compiles."""
    for name, value in _WHILE_TRACING.items() if not _BEFORE else ():
        if hasattr(config, name):
            _BEFORE[name] = getattr(config, name)
            setattr(config, name, value)
    return True


def _as_before() -> None:
    while _BEFORE:
        setattr(config, *_BEFORE.popitem())


def _needed_guards(guards: Sequence[Any]) -> list[bool]:
    """All but those that ask, five times for each weight, whether it was marked as dynamic."""
    marks = "DIMENSION_DYNAMIC_MARKING_GUARD"
    return [g.guard_type != marks or g.name.startswith("L['batch']") for g in guards]


_NOT_TRACED = (exc.Unsupported, exc.UserError)
OPTIONS = {"guard_filter_fn": _needed_guards, "size_asserts": False}
"""What a `Program` asks of inductor, beside what the user's mode means."""


def _meant_by(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from torch._inductor import list_mode_options  # which takes long to import

    return list_mode_options(mode)


@attrs.define(eq=False)
class Program:
    """A function as one graph, or in pieces where it can't be one; then a warning says why.

    Each has graphs of its own: torch counts recompilations for each piece of code, and
    two steps that share our code must not use up each other's.

    Attributes:
        name: How the user wrote what compiles it.
        function: What is compiled: a plain function; it calls `allow_backward` first.
        settings: For `torch.compile`.
    """

    name: str
    function: Any
    settings: Mapping[str, Any]
    _whole: bool = attrs.field(init=False, default=True)
    _compiled: Callable[..., Any] = attrs.field(init=False)
    _watch: "Watch" = attrs.field(init=False)
    _own: Any = attrs.field(init=False)
    _names: tuple[str, ...] = attrs.field(init=False)
    _graphs: list[tuple[Any, Callable[..., Any]]] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self._watch = Watch(self.name)
        self._compile(whole=True)

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns, computed by its graphs."""
        if self._graphs and eval_frame._stance.stance == "default":  # noqa: SLF001
            values = dict(zip(self._names, arguments, strict=True))
            for entry, graph in self._graphs:
                if entry.guard_manager.check(values):
                    return graph(*arguments)
        return self._through_dynamo(arguments)

    def _through_dynamo(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self._compiled(*arguments)
        except _NOT_TRACED as error:  # nothing has run yet
            self._warn("one graph", _reason(error))
        except exc.FailOnRecompileLimitHit as error:
            self._warn("so many graphs", _reason(error))
        finally:
            if _BEFORE:
                _as_before()
                self._keep()
                self._watch.look()
        self._compile(whole=False)
        return self._through_dynamo(arguments)

    def _compile(self, *, whole: bool) -> None:
        code = self.function.__code__.replace()  # dynamo keeps graphs by code object
        self._own = types.FunctionType(code, self.function.__globals__, self.function.__name__)
        self._names = code.co_varnames[: code.co_argcount]
        settings = {"fullgraph": whole, **self.settings}
        if settings.get("backend", "inductor") == "inductor":
            # A mode is a name for options, and torch takes one of the two only
            settings["options"] = {**_meant_by(settings.pop("mode", None)), **OPTIONS}
        self._compiled = torch.compile(self._own, **settings)
        self._graphs = []
        self._whole = whole

    def _keep(self) -> None:
        """Keep what dynamo has made, to check its guards and call it without dynamo between.

        Setting dynamo up for a call takes twice as long as the guards and the graph of a tiny
        model (torch 2.13: 31 of 85 us). What it has compiled is whole, so nothing is left for it.
        """
        if self._whole:
            entries = entries_of(self._own.__code__)
            space = self._own.__globals__
            self._graphs = [(entry, types.FunctionType(entry.code, space)) for entry in entries]

    def _warn(self, wanted: str, reason: str) -> None:
        warnings.warn(
            f"{self.name} cannot make {wanted} of this step, and goes on in pieces: {reason}",
            CompileWarning,
            stacklevel=4,
        )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = ("Explanation:", "Developer debug context:", "Hint:", "File ")
    told = [line for line in lines if line.startswith(wanted)]
    return " | ".join([*lines[:1], *told[:3], *told[-1:]])[:700]


@attrs.define
class Watch:
    """Counts how often something is compiled again, and warns once, with torch's reason.

    Attributes:
        name: How the user wrote what compiles.
    """

    name: str
    _seen: int = attrs.field(default=0, eq=False, repr=False)
    _again: int = attrs.field(default=0, eq=False, repr=False)
    _warned: bool = attrs.field(default=False, eq=False, repr=False)

    def look(self) -> None:
        """Look whether torch compiled anything again since the last look."""
        made = utils.counters["stats"]["unique_graphs"]
        if made == self._seen:
            return
        self._seen = made
        metrics = utils.get_compilation_metrics()
        reasons = [m.recompile_reason for m in metrics[-1:] if m.recompile_reason]
        self._again += len(reasons)
        if self._again >= EXPECTED and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} has compiled {self._again} times again, each time for what changed:"
                f" {reasons[-1][:400]}. Give batches one shape (drop_last=True, padding),"
                " dynamic=True, or keep what changes out of the step as a tensor",
                CompileWarning,
                stacklevel=5,
            )
