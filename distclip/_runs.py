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
        self._calls = 0

    def __call__(self, tensors: Sequence[Tensor]) -> Gradients:
        if torch.compiler.is_compiling():
            return collect(self._plan, tensors)  # addresses mean nothing there
        parameters = [tensors[i] for i in self._plan.positions]
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            self._layout = None  # gradients that were apart may lie side by side by now
        if self._layout is not None:
            collected = self._from_layout(self._layout, parameters)
            if collected is not None:
                return collected
        self._layout = self._layout_of(parameters) if self._mergeable else None
        collected = self._from_layout(self._layout, parameters) if self._layout is not None else None
        return collected if collected is not None else collect(self._plan, tensors)

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

    def _layout_of(self, parameters: list[Tensor]) -> _Layout | None:
        """How the gradients lie, or None if any of them cannot simply be taken as it is."""
        absent: list[int] = []
        members: list[int] = []
        locals_: list[Tensor] = []
        for i, gradient in enumerate(map(_gradient, parameters)):
            if gradient is None:
                absent.append(i)
                continue
            if isinstance(gradient, DTensor):
                if gradient._spec.placements != self._plan.placements[i].torch_placements:
                    return None
                gradient = gradient._local_tensor
            simple = (
                type(gradient) is Tensor and gradient.layout is torch.strided and gradient.is_contiguous()
            )
            if not simple or gradient.is_conj() or gradient.is_neg():
                return None
            if gradient.numel():
                members.append(i)
                locals_.append(gradient)
        addresses = list(map(Tensor.data_ptr, locals_))
        numbers: dict[tuple[torch.device, torch.dtype], int] = {}
        bucket_of = [numbers.setdefault((t.device, t.dtype), len(numbers)) for t in locals_]
        order = [n for _, _, n in sorted(zip(bucket_of, addresses, range(len(members)), strict=True))]
        runs: list[_Run] = []
        first_of: list[int] = []
        before = -1
        for n in order:
            if before < 0 or not self._adjacent(before, n, members, locals_, addresses):
                runs.append(_Run(bucket_of[n], len(first_of), 0, 0))
            run = runs[-1]
            first_of.append(run.first)
            runs[-1] = _Run(run.bucket, run.first, run.length + 1, run.numel + locals_[n].numel())
            before = n
        members, locals_ = [members[n] for n in order], [locals_[n] for n in order]
        addresses = [addresses[n] for n in order]
        sharded = [n for n, i in enumerate(members) if isinstance(parameters[i].grad, DTensor)]
        dtypes = [t.dtype for t in locals_]
        return _Layout(
            absent,
            members,
            sharded,
            [_spec(parameters[members[n]].grad) for n in sharded],
            dtypes,
            first_of,
            [address - addresses[first] for address, first in zip(addresses, first_of, strict=True)],
            any(dtype.is_complex for dtype in set(dtypes)),
            runs,
            len(numbers),
        )

    def _adjacent(
        self, a: int, b: int, members: list[int], locals_: list[Tensor], addresses: list[int]
    ) -> bool:
        first, second = locals_[a], locals_[b]
        return (
            addresses[a] + first.numel() * first.element_size() == addresses[b]
            and self._kinds[members[a]] == self._kinds[members[b]]
            and first.dtype == second.dtype
            and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        )
