"""distclip in the place of the functions that clip, for ``distclip run``."""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from distclip import functional
from distclip.apply.change import OnNonfinite
from distclip.audit.pieces import living
from distclip.audit.recorder import place_of_call
from distclip.audit.watching import Call, Function
from distclip.clipper import Clipper
from distclip.integrations import accelerate
from distclip.layout.fsdp1 import annotate_fsdp1
from distclip.layout.synchronisation import is_fsdp1
from distclip.monitor.history import History
from distclip.strategies import GlobalNorm
from distclip.strategies._base import Strategy

# Those that need no arguments, and leave out no step, which the script would take all the same.
_STRATEGIES = ("AdaGC", "Percentile", "ZClip", "SPAM")


class Replacing:
    """Stands in the place of the functions.

    Args:
        strategy: makes one that decides in the place of ``max_norm``, or None.
        history: where every step is recorded.

    Attributes:
        replaced: how often, by function and place.
    """

    def __init__(self, strategy: Callable[[], Strategy] | None, history: Path | None) -> None:
        self._make = strategy
        self._history = None if history is None else History(history)
        self._clippers: dict[tuple[Any, ...], Clipper] = {}
        self._installed: dict[int, Any] = {}
        self._lists: dict[str, list[Tensor]] = {}  # of the latest call, by place
        self._exhausted: set[str] = set()
        self.replaced: Counter[tuple[str, str]] = Counter()
        self._latest: Tensor | None = None

    def can_replace(self, function: Function) -> bool:
        return function.name.split(".")[-1] in _REPLACED and function.kind in (
            "norm",
            "value",
            "measure",
            "scale",
        )

    def __call__(self, function: Function, original: Callable[..., Any], call: Call) -> Any:
        if call.argument(function.norm_type) not in (None, 0.5, 1, 2, 3, float("inf"), "inf"):
            return original(*call.args, **call.kwargs)  # a norm that distclip does not have
        if function.name.startswith("Accelerator."):
            return self._by_accelerator(function, call)
        where = place_of_call()
        self.replaced[function.label, where] += 1
        if call.exhausted and where in self._lists:  # an iterator that the script has used up
            call = replace(call, tensors=self._lists[where])
            self._exhausted.add(where)
        before = self._lists.get(where, [])
        if len(before) != len(call.tensors) or not all(map(is_, before, call.tensors)):
            _annotate()  # which looks through all objects
        self._lists[where] = call.tensors
        return self._clip(function, call)

    def _clip(self, function: Function, call: Call) -> Any:
        if function.kind == "value":
            return functional.clip_grad_value_(call.tensors, call.argument(function.max_norm))
        p = call.argument(function.norm_type)
        p = 2.0 if p is None else p
        strict = bool(call.argument("error_if_nonfinite"))
        if function.kind == "measure":
            return functional.get_total_norm(call.tensors, p, strict)
        if function.kind == "scale":
            return functional.clip_grads_with_norm_(
                call.tensors, call.argument(function.max_norm), call.argument("total_norm")
            )
        bound = call.argument(function.max_norm)
        if self._make is None and self._history is None:
            self._latest = functional.clip_grad_norm_(call.tensors, bound, p, strict)
            return _as_torch_has_it(self._latest, call.tensors)
        strategy = self._make or partial(GlobalNorm, bound, p)
        key = (bound, p, strict, *map(id, call.tensors))
        if key not in self._clippers:
            policy: OnNonfinite = "raise" if strict else "propagate"
            self._clippers[key] = Clipper(call.tensors, strategy(), on_nonfinite=policy)
        report = self._clippers[key].clip()
        self._latest = report.total_norm
        if self._history is not None:
            self._history.record(report)
        return _as_torch_has_it(report.total_norm, call.tensors)

    def _by_accelerator(self, function: Function, call: Call) -> Any:
        """distclip is installed in it at its first call, and from then on what the script calls."""
        accelerator = call.args[0]
        if id(accelerator) not in self._installed:
            installed = self._installed[id(accelerator)] = accelerate.install(accelerator, self._make)
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                method = partial(self._as_installed, installed, name, getattr(accelerator, name))
                setattr(accelerator, name, method)
        return getattr(accelerator, function.name.split(".")[-1])(*call.args[1:], **call.kwargs)

    def _as_installed(self, installed: Any, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        self.replaced[f"Accelerator.{name}", place_of_call()] += 1
        before = installed.report
        result = method(*args, **kwargs)
        if installed.report is not before:
            self._latest = installed.report.total_norm
            if self._history is not None:
                self._history.record(installed.report)
        return result

    def close(self) -> None:
        for installed in self._installed.values():
            installed.remove()
        if self._history is not None:
            self._history.close()

    def as_text(self) -> str:
        if not self.replaced:
            return (
                "distclip run: nothing was replaced: the script has called no function that clips (see "
                "`distclip audit --help` for those that are known)"
            )
        latest = "" if self._latest is None else f"; the latest norm was {float(self._latest):.4g}"
        lines = [f"distclip run: {sum(self.replaced.values())} calls were distclip's{latest}"]
        lines += [
            f"  {where} got an iterator that was used up, and clips what it was given before"
            for where in sorted(self._exhausted)
        ]
        lines += [f"  {where}: {label}, {count} ×" for (label, where), count in self.replaced.items()]
        return "\n".join(lines)


_REPLACED = {
    "clip_grad_norm_", "clip_grad_norm", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_",
    "fsdp2_clip_grad_norm_", "gradient_norm_clipping",
}  # fmt: skip


def strategy_named(name: str) -> Callable[[], Strategy]:
    """
    Raises:
        ArgumentTypeError: none has this name, and those that there are.
    """
    strategies = importlib.import_module("distclip.strategies")
    for known in _STRATEGIES:
        if known.lower() == name.replace("-", "").replace("_", "").lower():
            made: Callable[[], Strategy] = getattr(strategies, known)
            return made
    expected = ", ".join(known.lower() for known in _STRATEGIES)
    raise argparse.ArgumentTypeError(f"there is no {name}: expected one of {expected}")


def _as_torch_has_it(norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Of DTensors a DTensor, whose ``full_tensor()`` scripts call."""
    mesh = next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)
    if mesh is None:
        return norm
    return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _annotate() -> None:
    """Parameters that FSDP1 manages say how they lie once their module has been looked at."""
    for module in filter(is_fsdp1, living(torch.nn.Module)):
        annotate_fsdp1(module)
