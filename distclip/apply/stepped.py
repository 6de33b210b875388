"""Which gradients have had their step: so that none is taken twice, nor by a scale that has moved on.

A program says nothing when it steps twice with the same gradients. What tells are the gradients: backward,
``zero_grad`` and every operation in place leave another tensor, or another version of it. That holds on every
rank alike, but for one that never has any gradient at all: it counts as unchanged.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from distclip.torch_private.autograd import version
from distclip.torch_private.dtensor import local_of
from distclip.torch_private.optimizers import has_step_hooks

_MOST_WATCHED = 256
"""Of the gradients of a step so many are looked at, evenly spaced, so that it takes microseconds."""

_gradient = attrgetter("grad")

LIVING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every clipper there is."""


def living_here() -> list[Any]:
    """Those that this thread has used last, while other threads may make some. The gradients of another
    thread's may be in the middle of a backward pass, which writes them without the interpreter's lock: to
    read them then may crash the process."""
    refs = list(LIVING.data)  # type: ignore[attr-defined]  # in one go, as iterating over LIVING is not
    here = threading.get_ident()
    return [clipper for ref in refs if (clipper := ref()) is not None and clipper.thread == here]


class Used:
    """The gradients of some parameters as they were at one moment, of which it keeps none alive.

    Attributes:
        any: whether there was any gradient then.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters[:: -(-len(parameters) // _MOST_WATCHED) or 1])
        gradients = list(map(_gradient, self._parameters))
        self._first = next((i for i, g in enumerate(gradients) if g is not None), None)
        self.any = self._first is not None
        first = None if self._first is None else gradients[self._first]
        # (A DTensor that is referred to weakly could not be swapped: module.to() does that.)
        self._witness = None if first is None else weakref.ref(local_of(first))
        self._versions = _versions(gradients)

    def unchanged(self) -> bool:
        """Whether they are still those. (Not seen: CUDA graphs and ``.data``, which leave no version.)"""
        if self._first is not None and self._witness is not None:
            gradient = self._parameters[self._first].grad
            if gradient is None or self._witness() is not local_of(gradient):
                return False
        now = _versions(list(map(_gradient, self._parameters)))
        return now is not None and now == self._versions


def _versions(gradients: Sequence[Tensor | None]) -> list[int] | None:
    try:
        return [-1 if g is None else version(local_of(g)) for g in gradients]
    except RuntimeError:  # inference tensors have none
        return None


class StepGuard:
    """Refuses an ``optimizer.step()`` of the script's own, left over behind ``clipper.step(optimizer)``.

    A hook on the optimizer, not on its class; it keeps neither of them alive, and goes with the clipper. A
    closure makes new gradients, and passes.
    """

    def __init__(self) -> None:
        self._used: weakref.WeakKeyDictionary[torch.optim.Optimizer, Used] = weakref.WeakKeyDictionary()
        self._handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()
        # What the script itself has stepped with, since there is a hook.
        self._others: weakref.WeakKeyDictionary[torch.optim.Optimizer, Used] = weakref.WeakKeyDictionary()
        self._stepping = False

    def taken(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        """The clipper has stepped, or skipped, ``optimizer`` with the gradients that there are."""
        self._used[optimizer] = Used(parameters)
        if optimizer not in self._handles and has_step_hooks(optimizer):
            self._handles[optimizer] = optimizer.register_step_pre_hook(_hook(weakref.ref(self)))

    @contextlib.contextmanager
    def stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around the clipper's own call of ``optimizer.step()``."""
        self._used.pop(optimizer, None)
        self._others.pop(optimizer, None)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def other_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The script steps ``optimizer`` by itself."""
        if not self._stepping:
            self._others[optimizer] = Used([p for group in optimizer.param_groups for p in group["params"]])

    def has_stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the script has stepped it with the gradients that there are."""
        used = self._others.get(optimizer)
        return used is not None and used.any and used.unchanged()

    def has_taken(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether its gradients are still those that it has been stepped with."""
        used = self._used.get(optimizer)
        return used is not None and used.unchanged()

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()


def _hook(guard: weakref.ref[StepGuard]) -> Callable[..., None]:
    def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = guard()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if own is None or closure is not None:
            return
        if own.has_taken(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__}.step() was called again with the gradients that clipper.step() "
                "has just used, so every step would be taken twice. clipper.step(optimizer) steps the "
                "optimizer: delete the line optimizer.step() (or scaler.step(optimizer)) behind it; or keep "
                "that line, and call clipper.clip() in the place of clipper.step(optimizer)."
            )
        own.other_step(optimizer)

    return before


class AfterStep(defaultdict[int, dict[str, Any]]):
    """What a GradScaler knows of its optimizers, after ``clipper.step`` has updated it: nothing, as after its
    own ``update()``. But it answers a left-over line, and a clipper whose gradients have the old scale.

    Args:
        fresh: makes the state of an optimizer, torch's own.
        guard: of the clipper that has stepped.
        optimizers: that it has stepped.
        others: the gradients that other clippers had then.
    """

    def __init__(
        self,
        fresh: Callable[[], dict[str, Any]],
        guard: StepGuard | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        others: Sequence[tuple[Any, Used]] = (),
    ) -> None:
        super().__init__(fresh)
        self._guard = None if guard is None else weakref.ref(guard)
        self._optimizers = {id(o): weakref.ref(o) for o in optimizers}
        self._others = weakref.WeakKeyDictionary({clipper: used for clipper, used in others if used.any})

    def __reduce__(self) -> Any:
        return defaultdict, (self.default_factory,), None, None, iter(self.items())

    def __missing__(self, key: int) -> dict[str, Any]:
        reference, guard = self._optimizers.get(key), None if self._guard is None else self._guard()
        optimizer = None if reference is None else reference()
        if optimizer is not None and guard is not None and guard.has_taken(optimizer):
            raise ValueError(
                "the scaler was called again for gradients that clipper.step(optimizer, scaler) has used: it "
                "unscales, steps and updates the scale. Delete the lines scaler.unscale_(optimizer), "
                "scaler.step(optimizer) and scaler.update() behind it."
            )
        return super().__missing__(key)

    def values(self) -> Any:
        if not self:  # only update() asks
            raise ValueError(
                "scaler.update() was called again: clipper.step(optimizer, scaler) has updated the scale. "
                "Delete the line scaler.update() behind it, or call clipper.step(optimizer, scaler, "
                "update=False)."
            )
        return super().values()

    def require_fresh(self, clipper: Any) -> None:
        """
        Raises:
            ValueError: the gradients of ``clipper`` were there when another one updated the scale.
        """
        used = self._others.get(clipper)
        if used is not None and used.unchanged():
            raise ValueError(
                "the scaler was updated by the step of another clipper, after the gradients of this one were "
                "made with the scale of before. Where one scaler serves several clippers only the last step "
                "updates it: first.step(optimizer, scaler, update=False), then "
                "last.step(other_optimizer, scaler)."
            )
