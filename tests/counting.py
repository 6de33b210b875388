"""Counting what a step costs, instead of timing it."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip.testing._surroundings import waits

# They add to one place in whatever order a GPU's threads come. (index_put_ sorts them.)
_ADDS = {"index_add_", "index_add", "scatter_add_", "scatter_add", "scatter_reduce_", "scatter_reduce"}


class unordered_sums(TorchDispatchMode):
    """Notes where a GPU would add several numbers in another order each time, so that replicas which hold
    the same numbers got other bits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _ADDS and "amax" not in args:
            _, dim, index, *_ = args
            assert dim == 0, f"{func}: look at other dims too"
            if index.unique().numel() < index.numel():
                self.seen.append(f"{func} to {index.tolist()}")
        return func(*args, **(kwargs or {}))


class count_host_syncs(TorchDispatchMode):
    """Counts what the host would wait for on a GPU: values (``.item()``, ``bool(t)``, ``float(t)``), and
    shapes that depend on values (masks, ``nonzero``, ``repeat_interleave``).

    Copies to and from a device cannot be seen on the CPU: for these see ``tests/device``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += waits(func, args)
        return func(*args, **(kwargs or {}))


class count_calls:
    """Counts the calls of functions, Python's and C's, that this thread makes: what the host does, whatever
    the machine is doing beside it. (Garbage collections, which come when they come, are put off.)"""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> count_calls:
        self._collects = gc.isenabled()
        gc.disable()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _note(self, frame: object, event: str, argument: object) -> None:
        self.count += event in ("call", "c_call")


def compares(clipper: distclip.Clipper, call: int) -> int:
    """1 where the gradients of plain copies are compared between ranks at this call, 0 where not."""
    if clipper.plan.compared == () or call & (call - 1):
        return 0
    return int(call > 1 or not clipper.plan.proven)
