"""Notes what calls do, on this rank, and changes nothing of it."""

from __future__ import annotations

import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from distclip.audit.note import Notes, Place, Sample, Stepped
from distclip.audit.pieces import Names, living, local_norm, parts_of
from distclip.audit.program import Enough
from distclip.audit.watching import Call, Function
from distclip.torch_private.dtensor import local_of
from distclip.torch_private.grad_scaler import scale_of, states_if_any
from distclip.torch_private.operators import TorchDispatchMode

_FIRST = 20  # calls at each place that are looked into; from then on every so manieth
_COUNTED = 1  # the call whose collectives and waits are counted
_MOST_NAMES = 8


class Recorder:
    """Watches clipping functions, backward passes and optimizers; :attr:`notes` grows.

    Args:
        every: of the calls after the first 20 at a place, each so manieth is looked into.
        steps: ends the script after so many clips; 0: never.
        note: is told after each call that was looked into.
        hold: called in each backward pass: by then ranks have met.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        steps: int = 0,
        note: Callable[[Notes], None] | None = None,
        hold: Callable[[], None] | None = None,
    ) -> None:
        self._every, self._most, self._note, self._hold = every, steps, note, hold
        self.notes = Notes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        self._places: dict[tuple[str, str], Place] = {}
        self._steppers: dict[int, Stepped] = {}
        self._names = Names()
        self._began = time.perf_counter()
        self._clips = 0
        self._since: dict[int, int] = {}  # how often parameters were clipped by norm since their last step
        self._clipped: dict[int, Any] = {}  # the gradients that they had then
        self._used: set[int] = set()  # parameters that were stepped since the last backward pass
        self._passes_then = 0  # backward passes since the last step, at the latest clip
        self._ever: set[int] = set()  # those that were clipped at all
        self._by_norm: set[int] = set()
        self._measured: list[Tensor] = []  # all parameters, when gradients were last looked up by them
        self._passes = 0  # backward passes since the last step
        self._stepped: dict[int, tuple[str, Tensor, Stepped]] = {}  # parameters that an optimizer has stepped
        self._latest: Place | None = None
        self._scalers: list[GradScaler] = []
        self._was_nonfinite = False
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._backward = torch.autograd.backward
        torch.autograd.backward = self._count_backward
        self._scaler_step = GradScaler.step
        recorder = self

        def step(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            return recorder._step_of_scaler(scaler, *args, **kwargs)

        scalers: Any = GradScaler
        scalers.step = step

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if torch.autograd.backward == self._count_backward:
            torch.autograd.backward = self._backward
        scalers: Any = GradScaler
        scalers.step = self._scaler_step

    def finish(self) -> Notes:
        """What has been noted, with what only the end tells."""
        self.notes.ended = True
        self.notes.seconds = time.perf_counter() - self._began
        for name, tensor, stepper in self._stepped.values():
            if id(tensor) not in self._ever:
                stepper.never.append(name)
            stepper.by_norm += id(tensor) in self._by_norm
        return self.notes

    # --- a call ------------------------------------------------------------------------------------------

    def __call__(self, function: Function, original: Callable[..., Any], call: Call) -> Any:
        """In the place of the function."""
        start = time.perf_counter()
        place = look = None
        try:
            place, look = self._before(function, call)
        except Exception as error:  # nothing that the audit cannot do may reach the script
            self._trouble(error)
        middle = time.perf_counter()
        if look is None or look.counting is None:
            result = original(*call.args, **call.kwargs)
        else:
            with look.counting:
                result = original(*call.args, **call.kwargs)
        end = time.perf_counter()
        try:
            if place is not None:
                if look is None or look.counting is None:
                    place.timed += 1
                    place.seconds += end - middle
                self._after(place, look, call, result)
        except Exception as error:
            self._trouble(error)
        self.notes.overhead += time.perf_counter() - end + middle - start
        self._clips += function.kind == "norm" or function.kind == "scale"
        if self._most and self._clips >= self._most:
            raise Enough(0)
        return result

    def _before(self, function: Function, call: Call) -> tuple[Place, _Look | None]:
        if dist.is_available() and dist.is_initialized():
            self.notes.rank, self.notes.world_size = dist.get_rank(), dist.get_world_size()
        where = place_of_call()
        place = self._places.get((function.label, where))
        if place is None:
            place = self._places[function.label, where] = Place(function.label, where, function.kind)
            self.notes.places.append(place)
        number, place.calls = place.calls, place.calls + 1
        place.exhausted += call.exhausted
        tensors = self._parameters(function, call)
        gradients = [t for t in tensors if t.grad is not None]
        place.empty += not gradients
        place.stale += any(id(t) in self._used for t in gradients)
        if function.kind in ("norm", "scale"):
            again = [t for t in gradients if self._clipped.get(id(t), _none)() is t.grad]
            same = set(map(id, again))
            place.early += bool(again) and self._passes > self._passes_then
            self._passes_then = self._passes
            for t in gradients:
                self._since[id(t)] = 1 + (self._since.get(id(t), 0) if id(t) in same else 0)
                self._clipped[id(t)] = weakref.ref(t.grad)
            self._by_norm |= set(map(id, tensors))
        if function.kind != "measure":
            self._ever |= set(map(id, tensors))
        if number >= _FIRST and number % self._every:
            return place, None
        p = _number(call.argument(function.norm_type))
        p = 2.0 if p is None else p
        sample = Sample(
            number,
            _number(call.argument(function.max_norm)),
            p,
            None,
            (),
            None,
            "",
            parts_of(tensors, self._names.of(tensors), p),
            scaled=self._is_scaled(number),
        )
        counting = _Counting() if number == _COUNTED else None  # which takes time itself
        return place, _Look(sample, tensors, local_norm(tensors), counting)

    def _parameters(self, function: Function, call: Call) -> list[Tensor]:
        """Also of gradients, which are looked up by the parameters that have them."""
        if function.gets != "gradients":
            return call.tensors
        holders = {id(t.grad): t for t in self._measured if t.grad is not None}
        if any(id(g) not in holders for g in call.tensors):
            self._measured = living(torch.nn.Parameter)
            holders = {id(t.grad): t for t in self._measured if t.grad is not None}
        return [holders.get(id(g), g) for g in call.tensors]

    def _after(self, place: Place, look: _Look | None, call: Call, result: Any) -> None:
        norm = result if isinstance(result, Tensor | float | int) else None
        if call.function.kind == "scale":
            norm = call.argument("total_norm")
        self._latest = place
        if look is None:
            return
        sample = look.sample
        if isinstance(norm, DTensor):
            if any(placement.is_partial() for placement in norm.placements):
                ranks = tuple(sorted(norm.device_mesh.mesh.flatten().tolist()))
                sample.partial_over = ranks
            sample.digits, norm = str(norm.dtype), local_of(norm)
        elif isinstance(norm, Tensor):
            sample.digits = str(norm.dtype)
        sample.norm = None if norm is None else float(norm)
        self._was_nonfinite = sample.norm is not None and not math.isfinite(sample.norm)
        after = local_norm(look.tensors)
        if look.before > 0 and math.isfinite(look.before) and call.function.kind in ("norm", "scale"):
            sample.coefficient = after / look.before
        if look.counting is not None:
            sample.collectives, sample.syncs = look.counting.collectives, look.counting.syncs
        place.samples.append(sample)
        if self._note is not None:
            self._note(self.notes)

    def _is_scaled(self, number: int) -> bool:
        if number & (number + 1) == 0:  # 0, 1, 3, 7, …: a look through all objects takes tens of milliseconds
            self._scalers = living(GradScaler)
        for scaler in self._scalers:
            scale = scale_of(scaler) if scaler.is_enabled() else None
            known = states_if_any(scaler) or {}
            unscaled = any(state["stage"] is not OptState.READY for state in known.values())
            if scale is not None and float(scale) != 1.0 and not unscaled:
                return True
        return False

    def _trouble(self, error: Exception) -> None:
        words = f"{type(error).__name__}: {error}"
        if words not in self.notes.troubles and len(self.notes.troubles) < _MOST_NAMES:
            self.notes.troubles.append(words)

    # --- backward passes and steps --------------------------------------------------------------------------

    def _count_backward(self, *args: Any, **kwargs: Any) -> Any:
        self.notes.backwards += 1
        self._used.clear()
        if self._hold is not None:
            self._hold()
        self._passes += 1
        return self._backward(*args, **kwargs)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            stepper = self._steppers.get(id(optimizer))
            if stepper is None:
                stepper = self._steppers[id(optimizer)] = Stepped(type(optimizer).__name__)
                self.notes.steppers.append(stepper)
            stepper.steps += 1
            tensors = [t for group in optimizer.param_groups for t in group["params"] if t.grad is not None]
            new = [t for t in tensors if id(t) not in self._stepped]
            for name, t in zip(self._names.of(new), new, strict=True) if new else ():
                stepper.total += 1
                self._stepped[id(t)] = name, t, stepper
            twice = [t for t in tensors if self._since.get(id(t), 0) > 1]
            if twice and not stepper.twice:
                stepper.twice = self._names.of(twice)[:_MOST_NAMES]
            if self._was_nonfinite and self._latest is not None:
                self._latest.nonfinite_steps += any(_is_nonfinite(t.grad) for t in tensors)
        except Exception as error:
            self._trouble(error)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._used.update(id(t) for group in optimizer.param_groups for t in group["params"])
        self._forget(optimizer)
        self._passes = self._passes_then = 0

    def _forget(self, optimizer: Any) -> None:
        """Its step has been taken, or left out by a scaler."""
        for group in optimizer.param_groups:
            for t in group["params"]:
                self._since.pop(id(t), None)
                self._clipped.pop(id(t), None)
        self._was_nonfinite = False

    def _step_of_scaler(self, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._scaler_step(scaler, optimizer, *args, **kwargs)
        try:
            self._forget(optimizer)
        except Exception as error:
            self._trouble(error)
        return result


class _Look:
    """What is noted before a call and compared after it."""

    def __init__(
        self, sample: Sample, tensors: Sequence[Tensor], before: float, counting: _Counting | None
    ) -> None:
        self.sample, self.tensors, self.before, self.counting = sample, list(tensors), before, counting


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collectives that are started, and values that the host waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # so that what it does to its local tensors is seen
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            self.collectives += 1
        self.syncs += name.startswith(("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal."))
        return func(*args, **(kwargs or {}))


def _none() -> None:
    return None


def _is_nonfinite(gradient: Any) -> bool:
    return gradient is not None and not bool(torch.isfinite(local_of(gradient)).all())


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def place_of_call() -> str:
    """The file and line that called the function: the first outside the audit, and of torch."""
    frame: Any = sys._getframe(1)
    here = os.path.dirname(__file__)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(here) and "/torch/" not in name and not name.startswith("<"):
            return f"{os.path.relpath(name) if name.startswith(os.getcwd()) else name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
