"""How torch calls operators: tensors that only pretend, and modes that see every call."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "LOSES_SCALARS",
    "READ_TO_HOST",
    "FakeTensor",
    "TorchDispatchMode",
    "schema_of",
    "tree_leaves",
    "tree_map",
]

# FakeTensor: the class of tensors that have shape, dtype and device, and no values. In 2.6 already.
# TorchDispatchMode: sees every operator below autograd. In 2.6 already; torch's documentation teaches it by
# this name.
# tree_leaves, tree_map: of nested lists, tuples and dictionaries. In 2.6 already. (torch.utils.pytree, the
# public one, is newer than that.)

schema_of = attrgetter("_schema")
"""Of an operator as a dispatch mode gets it: its arguments, and which of them it writes. In 2.6 already."""

READ_TO_HOST: Any = torch.ops.aten._local_scalar_dense.default
"""The operator behind ``item()``. In 2.6 already."""

LOSES_SCALARS = (2, 7) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 15)
"""Whether a compiled function loses what it writes to a 0-dim float64 tensor on the CPU that it was given: so
in 2.8 to 2.14; 2.6 keeps it, and 2.15 does again."""
