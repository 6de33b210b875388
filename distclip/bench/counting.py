"""Counting what one call costs: bytes moved, collectives, host syncs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.torch_private.operators import READ_TO_HOST, TorchDispatchMode, schema_of, tree_leaves

_WRITE_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_"}  # what they write they do not read
_WRITE_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


@dataclass(frozen=True)
class Counts:
    """Of one rank.

    Attributes:
        bytes_moved: read and written by the operators, whatever the caches make of it.
        collectives: that move data between ranks.
        host_syncs: values that the host asked a tensor for.
    """

    bytes_moved: int
    collectives: int
    host_syncs: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_moved = self.collectives = self.host_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does with the local tensors comes here again
        out = func(*args, **(kwargs or {}))
        schema = schema_of(func)
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += "wait" not in schema.name and "barrier" not in schema.name
        elif func is READ_TO_HOST:
            self.host_syncs += 1
        elif not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            self._add(schema, args, kwargs or {}, out)
        return out

    def _add(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        for i, argument in enumerate(schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            size = _bytes(given)
            written = argument.alias_info is not None and argument.alias_info.is_write
            read = not (written and (schema.name in _WRITE_ONLY or argument.is_out))
            self.bytes_moved += size * (int(read) + int(written))
        if not any(r.alias_info is not None for r in schema.returns) and schema.name not in _WRITE_NOTHING:
            self.bytes_moved += _bytes(out)


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def count(call: Callable[[], object]) -> Counts:
    """Make the call once, and count. (By looking at every operator: not for CUDA graphs, Triton kernels.)"""
    with _Counter() as counter:
        call()
    return Counts(counter.bytes_moved, counter.collectives, counter.host_syncs)


def count_cuda_syncs(call: Callable[[], object]) -> int:
    """Make the call once, and count how often the host waits for the device: torch's own sync debug mode,
    which sees copies too."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)
