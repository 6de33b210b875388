"""Something to be done with DDP's gradients after they have been averaged: its communication hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distclip._placement import resolve_group

Action: TypeAlias = Callable[[dist.GradBucket], None]
"""Called with each bucket of averaged gradients, on whatever thread finished the average."""


@dataclass(eq=False)
class Averaging:
    """The state of the hook. DDP keeps it as long as it lives, so it refers to nothing once removed."""

    group_name: str
    action: Action | None = None

    def remove(self) -> None:
        """From now on only average, which is what DDP does without a hook."""
        self.action = None


def after_averaging(model: DistributedDataParallel, action: Action) -> Averaging:
    """Have ``action`` called in backward with each bucket of gradients, averaged.

    DDP takes one communication hook in its life. One that was removed here is used again.

    Raises:
        TypeError: ``model`` is not DDP.
        ValueError: ``model`` has an action already.
        RuntimeError: from torch: ``model`` has a communication hook of someone else's.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model={type(model).__name__}: expected a DistributedDataParallel module")
    for _, state in model._comm_hooks:
        if isinstance(state, Averaging):
            if state.action is not None:
                raise ValueError("this DDP module has a hook of distclip already: remove that one first")
            state.action = action
            return state
    averaging = Averaging(model.process_group.group_name, action)
    model.register_comm_hook(averaging, _average_then_act)
    return averaging


# Without annotations: DDP compares them with classes, and here they would be strings.
def _average_then_act(state, bucket):  # type: ignore[no-untyped-def]
    averaged = allreduce_hook(resolve_group(state.group_name), bucket)
    action = state.action
    if action is None:
        return averaged

    def act(future: Any) -> Any:
        with torch.no_grad():
            action(bucket)
        return future.value()

    return averaged.then(act)
