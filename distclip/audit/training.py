"""What a script does around its clips: backward passes, steps, gradients zeroed, losses scaled."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distclip.audit.note import Notes, Place, Stepped
from distclip.audit.pieces import Names, living
from distclip.torch_private.autograd import version
from distclip.torch_private.dtensor import local_of
from distclip.torch_private.grad_scaler import scale_of, states_if_any

_MOST_NAMES = 8


@dataclass
class _Parameter:
    """What has happened to one.

    Attributes:
        stepper: the optimizer that has stepped it, None before.
        clipped, by_norm: whether a call has clipped it at all; by norm.
        gradient: when it was clipped by norm last, by identity; None after a step, or where it was zeroed.
        times: how often since then.
        used: the gradient of its last step, and its version.
    """

    alive: weakref.ref[Tensor]
    name: str = ""
    stepper: Stepped | None = None
    clipped: bool = False
    by_norm: bool = False
    gradient: weakref.ref[Tensor] | None = None
    times: int = 0
    used: tuple[weakref.ref[Tensor], int] | None = None


class Training:
    """Grows :attr:`notes` with what optimizers step; calls ``trouble`` with what it cannot do.

    Attributes:
        passes: backward passes so far.
    """

    def __init__(self, notes: Notes, names: Names, trouble: Callable[[Exception], None]) -> None:
        self._notes, self._names, self._trouble = notes, names, trouble
        self.passes = 0
        self.on_backward: Callable[[], None] | None = None
        self._parameters: dict[int, _Parameter] = {}
        self._trained: list[_Parameter] = []  # those that an optimizer has stepped
        self._steppers: dict[int, tuple[weakref.ref[Any], Stepped]] = {}
        self._latest: Place | None = None  # of the clip by norm that came last, in this many backward passes:
        self._passes_then = 0
        self._nonfinite: Place | None = None  # of a clip whose norm was not finite, since the last step
        self._scaled: weakref.WeakSet[GradScaler] = weakref.WeakSet()  # have scaled a loss since their update
        self._owners: list[Any] = []
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._undo: list[tuple[Any, str, Any]] = []
        self._wrap(torch.autograd, "backward", before=self._backward)
        self._wrap(torch.optim.Optimizer, "zero_grad", before=self._zeroed)
        self._wrap(nn.Module, "zero_grad", before=self._zeroed)
        self._wrap(GradScaler, "scale", before=lambda scaler, *_: self._scaled.add(scaler))
        self._wrap(GradScaler, "step", after=lambda scaler, optimizer, *_: self._forget(_held(optimizer)))
        self._wrap(GradScaler, "update", after=lambda scaler, *_: self._scaled.discard(scaler))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for holder, name, original in reversed(self._undo):
            setattr(holder, name, original)

    def finish(self) -> None:
        """What only the end tells."""
        for parameter in self._trained:
            assert parameter.stepper is not None
            parameter.stepper.by_norm += parameter.by_norm
            if not parameter.clipped:
                parameter.stepper.never.append(parameter.name)
            tensor = parameter.alive()
            if tensor is not None and _is_nonfinite(tensor):
                self._notes.nonfinite.append(parameter.name)

    # --- asked at a clip ------------------------------------------------------------------------------------

    def is_stale(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a step has used these very gradients, which nobody has written to since."""
        found = [(self._of(t).used, t.grad) for t in tensors if t.grad is not None]
        stale = [used for used, g in found if used and used[0]() is g and used[1] == version(g)]
        return bool(found) and 2 * len(stale) > len(found)

    def clipped(self, place: Place, tensors: Sequence[Tensor], *, by_norm: bool) -> None:
        """Just now, or about to be."""
        again = False
        for t in {id(t): t for t in tensors}.values():
            parameter = self._of(t)
            parameter.clipped = True
            if not by_norm:
                continue
            parameter.by_norm = True
            if t.grad is None:
                continue
            same = parameter.gradient is not None and parameter.gradient() is t.grad
            again = again or same
            parameter.times = parameter.times + 1 if same else 1
            parameter.gradient = weakref.ref(t.grad)
        if by_norm:
            place.early += again and self.passes > self._passes_then and bool(self._steppers)
            self._latest, self._passes_then = place, self.passes

    def was_nonfinite(self, place: Place, tensors: Sequence[Tensor]) -> None:
        """The norm; such gradients are mostly left out."""
        self._nonfinite = place
        self._forget(tensors)

    def is_scaled(self, tensors: Sequence[Tensor], *, look: bool) -> bool:
        """Whether a loss has been scaled, and none of the scalers has unscaled some of these. ``look``: for
        optimizers that have been made since, which takes tens of milliseconds."""
        scalers = [s for s in self._scaled if s.is_enabled() and _is_not_one(scale_of(s))]
        if not scalers:
            return False
        if look:
            self._owners = [weakref.ref(o) for o in living(torch.optim.Optimizer)]
        states = [states_if_any(s) or {} for s in scalers]
        stepped: set[int] = set()  # parameters of some optimizer, and of one that has been unscaled
        unscaled: set[int] = set()
        for optimizer in (o for ref in self._owners if (o := ref()) is not None):
            held = set(map(id, _held(optimizer)))
            stepped |= held
            if any(s[id(optimizer)]["stage"] is not OptState.READY for s in states if id(optimizer) in s):
                unscaled |= held
        return any(id(t) in stepped and id(t) not in unscaled for t in tensors if t.grad is not None)

    # --- what happens ---------------------------------------------------------------------------------------

    def _backward(self, *_: Any) -> None:
        self._notes.backwards += 1
        self.passes += 1
        if self.on_backward is not None:
            self.on_backward()

    def _zeroed(self, holder: Any, *_: Any) -> None:
        self._forget(_held(holder))

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            self._note_step(optimizer)
        except Exception as error:
            self._trouble(error)

    def _note_step(self, optimizer: Any) -> None:
        known = self._steppers.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            known = weakref.ref(optimizer), Stepped(type(optimizer).__name__)
            self._steppers[id(optimizer)] = known
            self._notes.steppers.append(known[1])
        stepper = known[1]
        stepper.steps += 1
        tensors = [t for t in _held(optimizer) if t.grad is not None]
        parameters = [self._of(t) for t in tensors]
        new = [(t, p) for t, p in zip(tensors, parameters, strict=True) if p.stepper is None]
        for name, (_, p) in zip(self._names.of([t for t, _ in new]), new, strict=True) if new else ():
            p.name, p.stepper = name, stepper
            stepper.total += 1
            self._trained.append(p)
        twice = [t for t, p in zip(tensors, parameters, strict=True) if p.times > 1]
        if twice and not stepper.twice:
            stepper.twice = self._names.of(twice)[:_MOST_NAMES]
        same = any(
            p.gradient is not None and p.gradient() is t.grad
            for t, p in zip(tensors, parameters, strict=True)
        )
        if same and self._latest is not None and self.passes > self._passes_then:
            self._latest.early += 1
        skips = getattr(optimizer, "found_inf", None)
        if self._nonfinite is not None and not (skips is not None and float(skips)):
            self._nonfinite.nonfinite_steps += any(_is_nonfinite(t.grad) for t in tensors)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            tensors = _held(optimizer)
            for t in tensors:
                if t.grad is not None:
                    self._of(t).used = weakref.ref(t.grad), version(t.grad)
            self._forget(tensors)
            self._nonfinite = None
        except Exception as error:
            self._trouble(error)

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        """What they were clipped for is over."""
        for t in tensors:
            parameter = self._of(t)
            parameter.gradient, parameter.times = None, 0

    def _of(self, tensor: Tensor) -> _Parameter:
        found = self._parameters.get(id(tensor))
        if found is None or found.alive() is not tensor:
            found = self._parameters[id(tensor)] = _Parameter(weakref.ref(tensor))
        return found

    def _wrap(
        self,
        holder: Any,
        name: str,
        *,
        before: Callable[..., object] | None = None,
        after: Callable[..., object] | None = None,
    ) -> None:
        original = getattr(holder, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            self._try(before, args)
            result = original(*args, **kwargs)
            self._try(after, args)
            return result

        self._undo.append((holder, name, original))
        setattr(holder, name, watched)

    def _try(self, call: Callable[..., object] | None, args: Any) -> None:
        if call is not None:
            try:
                call(*args)
            except Exception as error:
                self._trouble(error)


def _held(holder: Any) -> list[Tensor]:
    """The parameters of a module or an optimizer."""
    if isinstance(holder, nn.Module):
        return list(holder.parameters())
    return [t for group in holder.param_groups for t in group["params"]]


def _is_not_one(scale: Tensor | None) -> bool:
    return scale is not None and float(scale) != 1.0


def _is_nonfinite(tensor: Any) -> bool:
    return tensor is not None and not bool(torch.isfinite(local_of(tensor)).all())
