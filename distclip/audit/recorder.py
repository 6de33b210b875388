"""Notes what calls do, on this rank, and changes nothing of it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.audit.comparison import seconds_of_distclip
from distclip.audit.note import Notes, Place, Sample
from distclip.audit.pieces import Names, living, local_norm, parts_of
from distclip.audit.program import Enough
from distclip.audit.training import Training
from distclip.audit.watching import Call, Function
from distclip.torch_private.ddp import lets_ranks_be_absent
from distclip.torch_private.dtensor import local_of
from distclip.torch_private.operators import TorchDispatchMode

_FIRST = 20  # calls at each place that are looked into; from then on every so manieth
_COUNTED = 1  # the call whose collectives and waits are counted
_COMPARED = 2  # the call for whose gradients distclip's own time is taken
_MOST_TROUBLES = 8


class Recorder:
    """Stands in the place of clipping functions; :attr:`notes` grows.

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
        self._every, self._most, self._note = every, steps, note
        self.notes = Notes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        self._places: dict[tuple[str, str], Place] = {}
        self._names = Names()
        self._began, self._clips = time.perf_counter(), 0
        self._holders: list[Tensor] = []  # all parameters, when gradients were last looked up by them
        self._training = Training(self.notes, self._names, self._trouble)
        self._training.on_backward = hold

    def remove(self) -> None:
        self._training.remove()

    def finish(self) -> Notes:
        """What has been noted, with what only the end tells."""
        self.notes.ended = True
        self.notes.seconds = time.perf_counter() - self._began
        try:
            self._training.finish()
        except Exception as error:
            self._trouble(error)
        return self.notes

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
        self._clips += function.kind in ("norm", "scale")
        if self._most and self._clips >= self._most:
            raise Enough(0)
        return result

    def _before(self, function: Function, call: Call) -> tuple[Place, _Look | None]:
        if dist.is_available() and dist.is_initialized():
            self.notes.rank, self.notes.world_size = dist.get_rank(), dist.get_world_size()
        bound = _number(call.argument(function.max_norm))
        kind = function.kind if bound != math.inf else "measure"  # only to know the norm
        where = place_of_call()
        place = self._places.get((function.label, where))
        if place is None:
            place = self._places[function.label, where] = Place(function.label, where, kind)
            self.notes.places.append(place)
        number, place.calls = place.calls, place.calls + 1
        place.exhausted += call.exhausted
        tensors = self._parameters(function, call)
        place.empty += all(t.grad is None for t in tensors)
        if kind != "measure":
            place.stale += self._training.is_stale(tensors)
            self._training.clipped(place, tensors, by_norm=kind in ("norm", "scale"))
        p = _number(call.argument(function.norm_type))
        p = 2.0 if p is None else p
        if p <= 0 or (number >= _FIRST and number % self._every):
            return place, None
        often = number & (number + 1) == 0  # 0, 1, 3, 7, …
        parts = parts_of(tensors, self._names.of(tensors), p)
        sample = Sample(number, bound, p, None, (), None, "", parts)
        sample.scaled = self._training.is_scaled(tensors, look=often)
        if number == 0:
            self.notes.joins = self.notes.joins or any(
                map(lets_ranks_be_absent, living(DistributedDataParallel))
            )
        if number == _COMPARED and kind == "norm" and bound is not None:
            place.ours = seconds_of_distclip(tensors, bound, p)
        counting = _Counting() if number == _COUNTED else None  # which takes time itself
        return place, _Look(sample, tensors, local_norm(tensors), counting)

    def _parameters(self, function: Function, call: Call) -> list[Tensor]:
        """Also of gradients, which are looked up by the parameters that have them."""
        if function.gets != "gradients":
            return call.tensors
        holders = {id(t.grad): t for t in self._holders if t.grad is not None}
        if any(id(g) not in holders for g in call.tensors):
            self._holders = living(torch.nn.Parameter)
            holders = {id(t.grad): t for t in self._holders if t.grad is not None}
        return [holders.get(id(g), g) for g in call.tensors]

    def _after(self, place: Place, look: _Look | None, call: Call, result: Any) -> None:
        norm = result if isinstance(result, Tensor | float | int) else None
        if call.function.kind == "scale":
            norm = call.argument("total_norm")
        local = local_of(norm) if isinstance(norm, Tensor) else norm
        if look is not None or (isinstance(local, Tensor) and local.is_cpu):  # else the host would wait
            value = None if local is None else float(local)
            if value is not None and not math.isfinite(value) and place.kind != "measure":
                self._training.was_nonfinite(place, call.tensors)
        if look is None:
            return
        sample = look.sample
        if isinstance(norm, DTensor) and any(placement.is_partial() for placement in norm.placements):
            sample.partial_over = tuple(sorted(norm.device_mesh.mesh.flatten().tolist()))
        sample.digits = str(norm.dtype) if isinstance(norm, Tensor) else ""
        sample.norm = value
        if look.before > 0 and math.isfinite(look.before) and place.kind in ("norm", "scale"):
            sample.coefficient = local_norm(look.tensors) / look.before
        if look.counting is not None:
            sample.collectives, sample.syncs = look.counting.collectives, look.counting.syncs
        place.samples.append(sample)
        if self._note is not None:
            self._note(self.notes)

    def _trouble(self, error: Exception) -> None:
        words = f"{type(error).__name__}: {error}"
        if words not in self.notes.troubles and len(self.notes.troubles) < _MOST_TROUBLES:
            self.notes.troubles.append(words)


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


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


_STARTED_IN = os.getcwd()
_OURS, _TORCHS = os.path.dirname(__file__), os.path.dirname(torch.__file__) + os.sep


def place_of_call() -> str:
    """The file and line that called the function: the first outside the audit, and of torch. The file as seen
    from where the script was started, or in the package that was installed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OURS, _TORCHS, "<")):
            name = os.path.join(_STARTED_IN, name)
            *_, packaged = name.rpartition(f"{os.sep}site-packages{os.sep}")
            inside = packaged == name and name.startswith(_STARTED_IN + os.sep)
            return f"{os.path.relpath(name, _STARTED_IN) if inside else packaged}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
