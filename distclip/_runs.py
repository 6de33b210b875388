"""Runs: gradients that lie side by side in memory, taken as one tensor.

DDP and FSDP hand out gradients as adjacent views of a few flat buffers. What counts alike (same slot, same
multiplicity) and lies exactly adjacent is measured and changed in one go: 80 kernel calls instead of 720.
Padding between views is never read. The buffers move from step to step, so what is kept is how the
gradients lie relative to each other, checked by their addresses; the views are made anew, since keeping
them would keep the gradients' memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, sub
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip._gradients import Bucket, Gradients, collect
from distclip._plan import Plan
from distclip._reduction import local_of


@dataclass(frozen=True, eq=False)
class _Run:
    bucket: int
    first: int  # member
    length: int  # members
    numel: int


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the gradients of one step lay.

    Attributes:
        absent: parameters without a gradient.
        members: parameters with elements on this rank, in the order of their runs.
        sharded: of the members, those whose gradients are DTensors, by position; specs: their spec objects.
        dtypes: of the members; complex: whether any of them is.
        first_of: by member, the first member of its run; offsets: its distance from that, in bytes.
        runs: in order.
    """

    absent: list[int]
    members: list[int]
    sharded: list[int]
    specs: list[Any]
    dtypes: list[torch.dtype]
    first_of: list[int]
    offsets: list[int]
    complex: bool
    runs: list[_Run]
    num_buckets: int


# Everything per gradient is a loop inside Python's C code: with 720 of them that is half of the time. The
# flag of lazy negation is not looked at where nothing is complex: it changes neither norms nor multiples.
_gradient = attrgetter("grad")
_local = attrgetter("_local_tensor")
_spec = attrgetter("_spec")
_dtype = attrgetter("dtype")


class Collector:
    """:func:`collect`, step after step, with runs merged.

    Args:
        kinds: by parameter; adjacent gradients of equal kind may come as one tensor.
    """

    def __init__(self, plan: Plan, kinds: Sequence[Hashable]) -> None:
        self._plan, self._kinds = plan, kinds
        # Gradients that may have to be summed first are looked at one by one.
        self._mergeable = not plan.partial and not any(p.partial for p in plan.placements)
        self._layout: _Layout | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Gradients:
        if torch.compiler.is_compiling():
            return collect(self._plan, tensors)  # addresses mean nothing there
        parameters = [tensors[i] for i in self._plan.positions]
        if self._layout is not None:
            collected = self._from_layout(self._layout, parameters)
            if collected is not None:
                return collected
        collected = collect(self._plan, tensors)
        if not self._mergeable or collected.rebuilt:
            return collected
        self._layout = self._layout_of(collected)
        if self._layout is None:
            return collected
        return self._from_layout(self._layout, parameters) or collected

    def _from_layout(self, layout: _Layout, parameters: list[Tensor]) -> Gradients | None:
        """The runs of this step, or None where the gradients do not lie so any more."""
        gradients: list[Any] = list(map(_gradient, parameters))
        for i in layout.absent:
            if gradients[i] is not None:
                return None
        members: list[Any] = [gradients[i] for i in layout.members]
        if layout.sharded:
            found = members if len(layout.sharded) == len(members) else [members[i] for i in layout.sharded]
            if not all(map(isinstance, found, repeat(DTensor))):
                return None
            for here, spec in zip(map(_spec, found), layout.specs, strict=True):
                if here is not spec and here.placements != spec.placements:
                    return None
            if found is members:
                members = list(map(_local, members))
            else:
                for i in layout.sharded:
                    members[i] = members[i]._local_tensor
        if set(map(type, members)) - {Tensor}:
            return None
        if list(map(_dtype, members)) != layout.dtypes or not all(map(Tensor.is_contiguous, members)):
            return None
        if layout.complex and (any(map(Tensor.is_conj, members)) or any(map(Tensor.is_neg, members))):
            return None
        try:
            addresses = list(map(Tensor.data_ptr, members))
        except RuntimeError:  # sparse
            return None
        if list(map(sub, addresses, map(addresses.__getitem__, layout.first_of))) != layout.offsets:
            return None
        if len(set(addresses)) != len(addresses):
            return None
        buckets = [Bucket() for _ in range(layout.num_buckets)]
        for run in layout.runs:
            tensor = members[run.first]
            if run.length > 1:
                room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
                if room < run.numel:  # adjacent by chance, in memory of different owners
                    return None
                tensor = tensor.as_strided((run.numel,), (1,))
            buckets[run.bucket].tensors.append(tensor)
            buckets[run.bucket].parameters.append(layout.members[run.first])
        return Gradients(parameters, buckets, [])

    def _layout_of(self, collected: Gradients) -> _Layout | None:
        gradients: list[Any] = list(map(_gradient, collected.parameters))
        members: list[int] = []
        first_of: list[int] = []
        offsets: list[int] = []
        dtypes: list[torch.dtype] = []
        runs: list[_Run] = []
        for b, bucket in enumerate(collected.buckets):
            if not all(t.is_contiguous() for t in bucket.tensors):
                return None
            pairs = sorted(zip(bucket.tensors, bucket.parameters, strict=True), key=lambda p: p[0].data_ptr())
            for i, (tensor, parameter) in enumerate(pairs):
                before = pairs[i - 1] if i else None
                if before is None or not self._adjacent(*before, tensor, parameter):
                    runs.append(_Run(b, len(members), 0, 0))
                run = runs[-1]
                runs[-1] = _Run(b, run.first, run.length + 1, run.numel + tensor.numel())
                members.append(parameter)
                first_of.append(run.first)
                dtypes.append(tensor.dtype)
                offsets.append(tensor.data_ptr() - pairs[i - (len(members) - 1 - run.first)][0].data_ptr())
        counted = set(members)
        for i, gradient in enumerate(gradients):
            if gradient is not None and i not in counted and local_of(gradient).numel():
                return None  # shares another's memory, and may cease to
        sharded = [n for n, i in enumerate(members) if isinstance(gradients[i], DTensor)]
        return _Layout(
            [i for i, g in enumerate(gradients) if g is None],
            members,
            sharded,
            [gradients[members[n]]._spec for n in sharded],
            dtypes,
            first_of,
            offsets,
            any(dtype.is_complex for dtype in dtypes),
            runs,
            len(collected.buckets),
        )

    def _adjacent(self, a: Tensor, i: int, b: Tensor, j: int) -> bool:
        return (
            self._kinds[i] == self._kinds[j]
            and a.data_ptr() + a.numel() * a.element_size() == b.data_ptr()
            and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        )
