"""What a DTensor holds on this rank, read without an operator, a new tensor or a node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

LOCAL_TENSOR, SPEC = "_local_tensor", "_spec"
"""The attributes of the two below, for ``getattr(tensor, SPEC)`` where ``torch.compile`` may trace: 2.13's
knows no ``attrgetter``."""

local_tensor = attrgetter(LOCAL_TENSOR)
"""Of a DTensor, its piece on this rank: the same object each time, in C, for loops. In 2.6 already.
(``to_local()`` is a node of autograd, and makes a new tensor.)"""

spec = attrgetter(SPEC)
"""Of a DTensor, how it lies: an object with ``mesh`` and ``placements``, mostly the same each step.
In 2.6 already."""


def local_of(tensor: Tensor) -> Tensor:
    """Of any tensor what this rank holds of it: the tensor itself, where it is no DTensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def offsets(tensor: DTensor) -> Sequence[int]:
    """By dim, where in the whole tensor this rank's piece begins. In 2.6 already."""
    of: Any = compute_local_shape_and_global_offset
    _, begins = of(tensor.shape, tensor.device_mesh, tensor.placements)
    found: Sequence[int] = begins
    return found
