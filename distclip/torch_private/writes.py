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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# All that distclip knows of copy-on-write is in this file. Where a release lacks any of it, nothing can be
# proven (AVAILABLE), and version counters have to do.
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
is_marked: Any = getattr(torch._C, "_is_cow_tensor", None)
# Where its memory begins, without taking the mark away, as ``data_ptr()`` does.
_storage_address: Any = getattr(torch._C, "_data_address", None)
AVAILABLE = None not in (_lazy_clone, is_marked, _storage_address)


class Mark:
    """What a storage was marked with. It holds until the storage is marked again.

    Several measure the same storage (two clippers; two gradients that lie in one). Where one of them marks it
    again, after something has been written, another's proof must not come back with that.
    """

    __slots__ = ("holds",)

    def __init__(self) -> None:
        self.holds = True


_marks: dict[int, Mark] = {}  # by storage; of one that is gone, whatever comes to lie there takes it over
_KEPT = 1 << 18


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
        if len(_marks) >= _KEPT:
            while _marks:
                _marks.popitem()[1].holds = False
        found = _marks[storage] = Mark()
    return found


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the elements of each lie, for tensors that have memory of their own."""
    if not AVAILABLE:
        return list(map(Tensor.data_ptr, tensors))
    begins, offsets = list(map(_storage_address, tensors)), list(map(Tensor.storage_offset, tensors))
    if not any(offsets):
        return begins
    sizes = map(Tensor.element_size, tensors)
    return [begin + offset * size for begin, offset, size in zip(begins, offsets, sizes, strict=True)]


def address(tensor: Tensor) -> int:
    return addresses([tensor])[0]
