"""Something to be done with DDP's gradients after they have been averaged: its communication hook.

DDP takes one such hook in its life. Everything here that wants one shares it: at most one action that changes
the averaged gradients, and after that any number of listeners that look at them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distclip.layout.placement import resolve_group
from distclip.torch_private import ddp

Action: TypeAlias = Callable[[dist.GradBucket], None]
"""Called with each bucket of averaged gradients, on whatever thread finished the average."""


class Listener(Protocol):
    """Who looks at buckets of averaged gradients, and leaves them as they are. Kept alive by others."""

    def expect(self, bucket: dist.GradBucket) -> Action | None:
        """A bucket is about to be averaged: called in backward, on its thread.

        Returns:
            What to call once it is; None where it is of no interest.
        """


@dataclass(eq=False)
class Averaging:
    """The state of the hook. DDP keeps it as long as it lives, so it refers to nothing once removed.

    Attributes:
        registered: whether a reducer of DDP has it. A copy of the module brings this state, and no hook.
    """

    group_name: str
    action: Action | None = None
    listeners: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    registered: bool = True

    def remove(self) -> None:
        """From now on only average, which is what DDP does without a hook."""
        self.action = None

    def __reduce__(self) -> tuple[type[Averaging], tuple[str, None, weakref.WeakSet[Any], bool]]:
        return Averaging, (self.group_name, None, weakref.WeakSet(), False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Averaging:
        return Averaging(self.group_name, registered=False)


def after_averaging(model: DistributedDataParallel, action: Action) -> Averaging:
    """Have ``action`` called in backward with each bucket of gradients, averaged.

    DDP takes one communication hook in its life. One that was removed here is used again.

    Raises:
        TypeError: ``model`` is not DDP.
        ValueError: ``model`` has an action already, or a communication hook of someone else's.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model={type(model).__name__}: expected a DistributedDataParallel module")
    averaging = averaging_of(model)
    if averaging.action is not None:
        raise ValueError("this DDP module has a hook of distclip already: remove that one first")
    averaging.action = action
    return averaging


def averaging_of(model: DistributedDataParallel) -> Averaging:
    """The hook of ``model``, registered at first need.

    Raises:
        ValueError: it has another, or averages some gradients elsewhere.
    """
    foreign = []
    for hook, state in ddp.comm_hooks(model):
        if not isinstance(state, Averaging):
            foreign.append(getattr(hook, "__qualname__", repr(hook)))
        elif state.registered:
            return state
    if foreign:
        raise ValueError(_taken(model, foreign[0]))
    if ddp.delays_all_reduce(model):
        raise ValueError(
            f"{_name(model)} was made with delay_all_reduce_named_params, whose gradients pass through its "
            "communication hook in another form: make it without, or clip after backward (distclip.Clipper)"
        )
    averaging = Averaging(model.process_group.group_name)
    try:
        model.register_comm_hook(averaging, _average_then_act)
    except RuntimeError:
        ddp.comm_hooks(model).pop()  # DDP has noted it all the same
        raise ValueError(_taken(model, "a built-in one")) from None
    return averaging


def _name(model: DistributedDataParallel) -> str:
    return f"DistributedDataParallel({type(model.module).__name__})"


def _taken(model: DistributedDataParallel, hook: str) -> str:
    return (
        f"{_name(model)} has a communication hook already, {hook}, and DDP takes only one in its life: clip "
        "after backward, where any hook has done its work (distclip.Clipper(model, strategy), without "
        "overlap=True), or make the DDP module anew without register_comm_hook"
    )


# Without annotations: DDP compares them with classes, and here they would be strings.
def _average_then_act(state, bucket):  # type: ignore[no-untyped-def]
    listening = [listener.expect(bucket) for listener in list(state.listeners)]
    averaged = allreduce_hook(resolve_group(state.group_name), bucket)
    actions = [action for action in (state.action, *listening) if action is not None]
    if not actions:
        return averaged

    def act(future: Any) -> Any:
        with torch.no_grad():
            for action in actions:
                action(bucket)
        return future.value()

    return averaged.then(act)
