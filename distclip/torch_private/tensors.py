"""What a tensor does not tell of itself: which storage it lies in, whether it overlaps itself, its parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """Which storage it lies in, also where that has no memory (fake ones): the address of torch's object. In
    2.6 already; it may be another's once the storage is gone."""
    return int(tensor.untyped_storage()._cdata)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements certainly lie in one place (expanded, say); False where torch does not know.
    In 2.6 already."""
    return bool(torch._debug_has_internal_overlap(tensor) == 1)


sparse_values: Callable[[Tensor], Tensor] = Tensor._values
"""Of a COO tensor, coalesced or not, as they lie. In 2.6 already. (``values()`` asks for a coalesced one.)"""

sparse_indices: Callable[[Tensor], Tensor] = Tensor._indices
"""[sparse dims, values] int64, likewise."""
