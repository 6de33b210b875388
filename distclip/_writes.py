"""Whether anything has written to a tensor: to the memory, by whatever name it was reached.

Autograd's version counters miss much: ``p.grad.data.mul_()``, NumPy, ``GradScaler.unscale_``, collectives,
foreach operators on DTensors. But on the CPU every kernel that writes asks the storage for its memory, and a
storage that is marked copy-on-write notes that: it stops being so. (One that nobody shares is not copied
then, and one that is only read stays marked.) So a mark that is still there is proof, for the price of
looking at one flag.

Not on accelerators: CUDA's allocator does not know copy-on-write memory for its own, and would no longer keep
what another stream uses.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

# What torch does not promise: all that distclip knows of copy-on-write is in this file.
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
is_marked: Any = getattr(torch._C, "_is_cow_tensor", None)
# Where its memory begins, without taking the mark away, as ``data_ptr()`` does.
_storage_address: Any = getattr(torch._C, "_data_address", None)
AVAILABLE = None not in (_lazy_clone, is_marked, _storage_address)

_is_cpu = attrgetter("is_cpu")


class Mark:
    """What a storage was marked with. It holds until the storage is marked again.

    Several measure the same storage (two clippers; two gradients that lie in one). Where one of them marks it
    again, after something has been written, another's proof must not come back with that.
    """

    __slots__ = ("__weakref__", "holds")

    def __init__(self) -> None:
        self.holds = True


_marks: weakref.WeakValueDictionary[int, Mark] = weakref.WeakValueDictionary()  # by storage


def can_be_proven(tensor: Tensor) -> bool:
    """Whether there can be proof that nothing has written to it. (Else there are version counters.)"""
    return AVAILABLE and tensor.is_cpu


def mark(tensor: Tensor) -> Mark | None:
    """From here on, ``is_marked(tensor)`` and ``mark.holds`` together say that nothing has written to the
    storage of a CPU tensor. None where it cannot be marked: its memory is pinned, shared, or not torch's."""
    storage = tensor.untyped_storage()._cdata
    found = _marks.get(storage)
    if not is_marked(tensor):
        if found is not None:
            found.holds = False
        try:
            _lazy_clone(tensor)
        except RuntimeError:
            return None
        if not is_marked(tensor):
            return None
        found = None
    if found is None or not found.holds:
        found = _marks[storage] = Mark()
    return found


def address(tensor: Tensor) -> int:
    """Where the elements lie."""
    if AVAILABLE and tensor.is_cpu:
        return int(_storage_address(tensor)) + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    if not AVAILABLE or not all(map(_is_cpu, tensors)):
        return list(map(address, tensors))
    begins, offsets = list(map(_storage_address, tensors)), list(map(Tensor.storage_offset, tensors))
    if not any(offsets):
        return begins
    sizes = map(Tensor.element_size, tensors)
    return [begin + offset * size for begin, offset, size in zip(begins, offsets, sizes, strict=True)]
