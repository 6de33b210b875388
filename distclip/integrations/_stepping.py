"""What happens when a script calls ``optimizer.step()`` by itself, after distclip has clipped."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from distclip.apply.optimizer_step import _lacks_momentum, is_fused, parameters_of, readable
from distclip.clipper import Clipper
from distclip.decide.transfer import Transfer
from distclip.inspection.advice import is_main_rank, logger
from distclip.torch_private.grad_scaler import scale_of, set_scale, states


class StepSkipper:
    """Lets the next step of an optimizer do nothing, where what was noted ([] bool) says so.

    The script calls ``optimizer.step()`` all the same. A fused optimizer takes the flag as a tensor. Any
    other finds no gradients, for which the host must know the flag; they are back after the step. What is
    no ``torch.optim.Optimizer`` has no hooks: :class:`StepOfAccelerate` leaves its step uncalled.

    Attributes:
        hooked: whether it has.
        was_skipped: the last step, in a form whose truth may be asked for; None before the first.
    """

    def __init__(self, optimizer: Any) -> None:
        self.was_skipped: bool | Awaited | None = None
        self.told = weakref.WeakSet[Any]()  # Accelerate's wrappers of this optimizer
        self._noted: tuple[int, Tensor, Tensor] | None = None
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._found: list[Tensor | None] = []
        self._handles: tuple[Any, ...] = ()
        self.hooked = isinstance(optimizer, torch.optim.Optimizer)
        if self.hooked:
            self._handles = (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._noted = None

    def note(self, skipped: Tensor, *, of: int = 0, told: Tensor | None = None) -> None:
        """
        Args:
            skipped: [] bool, whether the next step is to be left out.
            of: number of the backward pass. The optimizer's parameters may be clipped in several parts, each
                of which may say so; what was noted of an earlier pass, and never followed by a step, is void.
            told: [] bool, whether Accelerate hears that it was left out, where its scaler may do so as well.
        """
        told = skipped if told is None else told
        if self._noted is not None and self._noted[0] == of:
            skipped = self._noted[1].to(skipped.device) | skipped
            told = self._noted[2].to(told.device) | told
        self._noted = of, skipped, told

    def taken(self) -> tuple[Tensor, Tensor] | None:
        """What was noted, once: whether to skip, and whether to say so."""
        noted, self._noted = self._noted, None
        return None if noted is None else noted[1:]

    def leave_out(self, optimizer: torch.optim.Optimizer, skipped: Tensor, told: Tensor) -> None:
        """That of the step which is being taken, until its post hooks."""
        if is_fused(optimizer) and not _lacks_momentum(optimizer):
            found, flag = getattr(optimizer, "found_inf", None), skipped.float()
            flag = flag if found is None else torch.maximum(found, flag.to(found.device))
            optimizer.found_inf = readable(optimizer, flag)  # type: ignore[attr-defined]
            self._found = [found]
            self.was_skipped = bool(told) if told.is_cpu else Awaited(told)
        elif skipped.item():
            self.was_skipped = True
            self._hidden = [(p, p.grad) for p in parameters_of(optimizer)]
            for parameter, _ in self._hidden:
                parameter.grad = None

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._hidden, self._found, self.was_skipped = [], [], False
        noted = self.taken()
        if noted is not None:
            self.leave_out(optimizer, *noted)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        for found in self._found:
            if found is None:
                del optimizer.found_inf
            else:
                optimizer.found_inf = found
        self._hidden, self._found = [], []
        for accelerated in self.told:
            if accelerated.scaler is None:  # else it looks for itself, after the step
                accelerated._is_overflow = self.was_skipped


class StepOfAccelerate:
    """In the place of ``AcceleratedOptimizer.step``, where the optimizer's own hooks do not suffice: with a
    scaler, whose verdict Accelerate writes after them, and for what is no ``torch.optim.Optimizer``."""

    def __init__(self, accelerated: Any, skipper: StepSkipper) -> None:
        self._accelerated, self.skipper = accelerated, skipper
        self._step: Callable[..., Any] = accelerated.step
        accelerated.step = self

    def remove(self) -> None:
        if (
            vars(self._accelerated).get("step") is self
        ):  # else a scheduler has wrapped it: it stays, and idles
            del self._accelerated.step

    def __reduce__(self) -> Any:  # a copy of the optimizer has its plain method
        return getattr, (self._accelerated, "step")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        accelerated, skipper = self._accelerated, self.skipper
        if not accelerated.gradient_state.sync_gradients:
            return self._step(*args, **kwargs)
        skipper.was_skipped = None
        if skipper.hooked:
            result = self._step(*args, **kwargs)
        else:
            noted = skipper.taken()
            skipper.was_skipped = noted is not None and bool(noted[0])
            if not skipper.was_skipped:
                result = self._step(*args, **kwargs)
            elif accelerated.scaler is None:
                result = None
            else:  # the scaler takes its step, with nothing to call
                patched = accelerated._optimizer_patched_step_method
                accelerated._optimizer_patched_step_method = _nothing
                try:
                    result = self._step(*args, **kwargs)
                finally:
                    accelerated._optimizer_patched_step_method = patched
        skipper.taken()  # the scaler may not have called the optimizer: it has skipped by itself
        if accelerated.scaler is None or not (skipper.was_skipped is None or skipper.was_skipped is False):
            accelerated._is_overflow = skipper.was_skipped
        return result


class Awaited:
    """A flag on a device, whose copy to the host nobody waits for who does not ask: ``bool(awaited)``."""

    def __init__(self, flag: Tensor) -> None:
        self._coming = Transfer(flag)

    def __bool__(self) -> bool:
        self._coming.wait()
        return bool(self._coming.values)

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(bool(self))

    def __reduce__(self) -> Any:
        return bool, (bool(self),)


class LossOfStep:
    """The loss of the backward passes since the last step, for a strategy that judges it.

    Attributes:
        value: None before the first.
        used: in a step; the next pass begins anew.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.used = False

    def add(self, part: Tensor) -> None:
        self.value = part if self.value is None or self.used else self.value + part
        self.used = False


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """For torch's lists of hooks, which are to keep nothing alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return hook


def load_if_it_fits(clipper: Clipper, state: dict[str, Any]) -> None:
    """Continue from what a checkpoint holds. Where another strategy has saved it, or one with other sizes,
    the strategy goes on without: a run may be resumed with another one. Every rank loads the same, and so
    finds the same."""
    try:
        clipper.load_state_dict(state)
    except ValueError as error:
        if is_main_rank():
            logger.warning("the checkpoint's state of the clipping strategy is left out: %s", error)


def leave_behind(patched: Any, *names: str, instead: Callable[[], dict[str, Any]] = dict) -> None:
    """Pickles and copies of the object are to have its class's own methods again, and ``instead``. Delete its
    ``__getstate__`` to end this."""
    original = getattr(patched, "__getstate__", None)  # object's own since Python 3.11

    def state() -> dict[str, Any]:
        whole = vars(patched) if original is None else original()
        return {key: whole[key] for key in whole if key not in (*names, "__getstate__")} | instead()

    patched.__getstate__ = state


def holders_of(tensors: list[Tensor]) -> list[str]:
    """The kinds of the living optimizers, torch's and others, that hold some of these, for a message: it
    looks at every object there is."""
    ids = frozenset(map(id, tensors))
    found, steps = set(), dict[type, bool]()
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in steps:
            steps[kind] = callable(getattr(kind, "step", None)) and not issubclass(kind, type)
        if not steps[kind]:
            continue
        try:
            holds = any(id(p) in ids for p in parameters_of(thing))
        except Exception:  # no optimizer; or somebody's property, which may do anything
            continue
        if holds:
            found.add(kind.__name__)
    return sorted(found)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


class KeepingScaler:
    """Keeps a scaler from unscaling again, or by another scale, what waits for the step of another optimizer.

    Accelerate calls ``scaler.update()`` with the step of each optimizer. The scaler then forgets of all of
    them that they have been unscaled; here it forgets that of the others with the next backward pass. And its
    scale may have changed, which is not that of the gradients that are there.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler, self._waiting = scaler, dict[int, Any]()
        self._before: Tensor | None = None  # the scale of the last backward pass, where updated since
        self._update = scaler.update
        scaler.update = self._update_but_keep
        leave_behind(scaler, "update")

    def remove(self) -> None:
        del self._scaler.update, self._scaler.__getstate__

    def forget(self) -> None:
        for key in self._waiting:
            states(self._scaler).pop(key, None)
        self._waiting, self._before = {}, None

    @contextlib.contextmanager
    def of_gradients(self) -> Iterator[None]:
        """In here the scale is the one that the gradients were made with."""
        now = scale_of(self._scaler)
        if self._before is not None:
            set_scale(self._scaler, self._before)
        try:
            yield
        finally:
            set_scale(self._scaler, now)

    def _update_but_keep(self, new_scale: Any = None) -> None:
        known = states(self._scaler)
        self._waiting = {key: s for key, s in known.items() if s["stage"] is OptState.UNSCALED}
        scale = scale_of(self._scaler)
        if self._before is None and scale is not None:
            self._before = scale.clone()
        self._update(new_scale)
        states(self._scaler).update(self._waiting)
