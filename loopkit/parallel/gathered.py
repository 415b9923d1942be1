"""When what a forward has gathered is freed: after its backward pass, or else at once."""

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.module_tracker import ModuleTracker

_NOW = ModuleTracker()  # never entered: it is torch's public word on whether a backward pass runs


@attrs.define(eq=False)
class Gathered:
    """Frees the parameters that torch leaves gathered after a forward, where nothing needs them.

    Those of the root, and of all blocks where they are not resharded after the forward: the
    backward pass that comes next would gather them again. But where none comes, the next forward
    would not see weights that were changed meanwhile (averages, a restored checkpoint),
    and who asks the model for its parameters would get copies in place of the shards.

    Attributes:
        modules: What torch may leave gathered.
        kept: A backward pass follows the forwards that it is told of; see `Shards.forward`.
        within: A method of the model runs, which may use them after a forward inside of it.
    """

    modules: tuple[FSDPModule, ...]
    kept: bool = False
    within: bool = False

    def watch(self, root: nn.Module, methods: tuple[str, ...] = ()) -> None:
        """Free them before and after each forward of the root, and of its methods of these names.

        Args:
            root: The sharded model.
            methods: What runs its forward beside `forward`.
        """
        outside: Any = torch.compiler.disable  # of what is compiled, as torch's own hooks are
        root.register_forward_pre_hook(outside(self.before), prepend=True)
        root.register_forward_hook(outside(self.after))
        for name in methods:
            register_fsdp_forward_method(root, name)
            method = getattr(root, name)
            through = functools.partial(self.through, method)
            setattr(root, name, functools.update_wrapper(through, method))

    def before(self, *_: Any) -> None:
        """Whatever is gathered still, is gathered anew: a forward sees the weights of now."""
        if not (self.within or _NOW.is_bw):
            self.free()

    def after(self, *_: Any) -> None:
        """Without gradients there is no backward pass; one that runs needs what it has gathered."""
        if not (self.within or (self.kept and torch.is_grad_enabled()) or _NOW.is_bw):
            self.free()

    def through(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method as a forward of the root."""
        self.before()
        outer, self.within = self.within, True
        try:
            return method(*args, **kwargs)
        finally:
            self.within = outer
            self.after()

    def free(self) -> None:
        """Leave shards; what torch is using within a forward stays."""
        for module in self.modules:
            module.reshard()
