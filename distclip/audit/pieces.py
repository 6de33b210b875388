"""What this rank holds of the gradients, in numbers, without asking any other."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip.audit.note import Part
from distclip.layout.fsdp1 import annotate_fsdp1
from distclip.layout.parameters import walk_modules
from distclip.layout.placement import MANAGED, PlacementReader
from distclip.layout.synchronisation import is_fsdp1
from distclip.torch_private.dtensor import local_of


class Names:
    """Of parameters, in the models that are alive, however the script passes them. For people: two models may
    use the same."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def of(self, tensors: Sequence[Tensor]) -> list[str]:
        if any(self._name(t) is None for t in tensors):
            self._look(tensors)
        return [self._name(t) or f"parameters[{i}]" for i, t in enumerate(tensors)]

    def _name(self, tensor: Tensor) -> str | None:
        alive, name = self._known.get(id(tensor), (_nothing, ""))
        return name if alive() is tensor else None

    def _look(self, tensors: Sequence[Tensor]) -> None:
        wanted = {id(t) for t in tensors}
        holders: list[nn.Module] = living(nn.Module)
        for module in filter(is_fsdp1, holders):
            annotate_fsdp1(module)
        inside = {id(child) for m in holders for child in m.children()}
        for top in (m for m in holders if id(m) not in inside):
            for p in walk_modules([top]):
                if id(p.tensor) in wanted and self._name(p.tensor) is None:
                    self._known[id(p.tensor)] = weakref.ref(p.tensor), p.name
        for i, t in enumerate(tensors):  # of no model: not to be looked for again
            if self._name(t) is None:
                self._known[id(t)] = weakref.ref(t), f"parameters[{i}]"


def _nothing() -> None:
    return None


def living(kind: type) -> list[Any]:
    """All objects of that class, or of one derived from it. (``isinstance`` would ask properties of some.)"""
    return [o for o in gc.get_objects() if issubclass(type(o), kind)]


def parts_of(tensors: Sequence[Tensor], names: Sequence[str], p: float) -> list[Part]:
    """In order, each once."""
    read, times = PlacementReader(), Counter(map(id, tensors))
    found: dict[int, Part] = {}
    for name, tensor in zip(names, tensors, strict=True):
        if id(tensor) in found:
            continue
        piece: tuple[int, ...] | None = None
        if isinstance(tensor, DTensor) or hasattr(tensor, MANAGED):
            piece = tuple(axis.coordinate for axis in read(name, tensor).shards)
        found[id(tensor)] = Part(
            name,
            tuple(tensor.shape),
            piece,
            power_of(tensor.grad, p),
            _fingerprint(tensor.grad),
            _fingerprint(tensor),
            str((tensor if tensor.grad is None else tensor.grad).dtype),
            times[id(tensor)],
        )
    return list(found.values())


def power_of(gradient: Tensor | None, p: float) -> float | None:
    """Σ|g|^p of what this rank holds; max|g| for p = ∞."""
    if gradient is None:
        return None
    flat = _flat(gradient)
    if not flat.numel():
        return 0.0
    if math.isinf(p):
        return float(flat.abs().max())
    return float(torch.linalg.vector_norm(flat, 2).square() if p == 2 else flat.abs().pow(p).sum())


def local_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all that this rank holds."""
    return math.sqrt(sum(power_of(t.grad, 2.0) or 0.0 for t in tensors))


def _fingerprint(tensor: Tensor | None) -> float:
    """Alike where the elements are; hardly ever elsewhere."""
    if tensor is None:
        return 0.0
    flat = _flat(tensor)
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return float(flat @ weights)


def _flat(tensor: Tensor) -> Tensor:
    """[elements] float64 of this rank's part."""
    local: Any = local_of(tensor).detach()
    if local.layout != torch.strided:
        local = local.coalesce().values() if local.layout == torch.sparse_coo else local.to_dense()
    if local.is_complex():
        local = torch.view_as_real(local)
    flat: Tensor = local.to(torch.float64).flatten()
    return flat
