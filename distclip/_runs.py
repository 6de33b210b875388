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
from typing import Any

import torch
from torch import Tensor

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
        absent: by parameter, whether there is no gradient.
        specs: by parameter, the DTensor's spec object, or None.
        members: parameters with elements on this rank, in the order of their runs.
        dtypes: of the members.
        first_of: by member, the first member of its run; offsets: its distance from that, in bytes.
        runs: in order.
    """

    absent: list[bool]
    specs: list[Any]
    members: list[int]
    dtypes: list[torch.dtype]
    first_of: Tensor  # [num_members] int64
    offsets: Tensor  # [num_members] int64
    runs: list[_Run]
    num_buckets: int


class Collector:
    """:func:`collect`, step after step, with runs merged.

    Args:
        kinds: by parameter; adjacent gradients of equal kind may come as one tensor.
    """

    def __init__(self, plan: Plan, kinds: Sequence[Hashable]) -> None:
        self._plan, self._kinds = plan, kinds
        self._is_dtensor = [p.mesh is not None for p in plan.placements]
        # Gradients that may have to be summed first are looked at one by one.
        self._mergeable = not plan.partial and not any(p.partial for p in plan.placements)
        self._layout: _Layout | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Gradients:
        if torch.compiler.is_compiling():
            return collect(self._plan, tensors)  # addresses mean nothing there
        parameters = [tensors[i] for i in self._plan.positions]
        gradients: list[Any] = [p.grad for p in parameters]
        if self._layout is not None:
            collected = self._from_layout(self._layout, parameters, gradients)
            if collected is not None:
                return collected
        collected = collect(self._plan, tensors)
        if not self._mergeable or collected.rebuilt:
            return collected
        gradients = [p.grad for p in parameters]  # some may just have been summed
        self._layout = self._layout_of(collected, gradients)
        if self._layout is None:
            return collected
        return self._from_layout(self._layout, parameters, gradients) or collected

    def _from_layout(
        self, layout: _Layout, parameters: list[Tensor], gradients: list[Any]
    ) -> Gradients | None:
        """The runs of this step, or None where the gradients do not lie so any more."""
        if [g is None for g in gradients] != layout.absent:
            return None
        for g, spec in zip(gradients, layout.specs, strict=True):
            if spec is not None and g._spec is not spec and g._spec.placements != spec.placements:
                return None
        is_dtensor = self._is_dtensor
        members: list[Tensor] = [
            gradients[i]._local_tensor if is_dtensor[i] else gradients[i] for i in layout.members
        ]
        if not all(type(t) is Tensor and t.layout is torch.strided for t in members):
            return None
        if [t.dtype for t in members] != layout.dtypes:
            return None
        if not all(t.is_contiguous() and not t.is_neg() for t in members):
            return None
        if any(dtype.is_complex for dtype in layout.dtypes) and any(t.is_conj() for t in members):
            return None
        addresses = [t.data_ptr() for t in members]
        if len(set(addresses)) != len(addresses):
            return None
        at = torch.tensor(addresses)
        if not torch.equal(at - at[layout.first_of], layout.offsets):
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

    def _layout_of(self, collected: Gradients, gradients: list[Any]) -> _Layout | None:
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
        return _Layout(
            [g is None for g in gradients],
            [
                g._spec if d and g is not None else None
                for g, d in zip(gradients, self._is_dtensor, strict=True)
            ],
            members,
            dtypes,
            torch.tensor(first_of, dtype=torch.int64),
            torch.tensor(offsets, dtype=torch.int64),
            runs,
            len(collected.buckets),
        )

    def _adjacent(self, a: Tensor, i: int, b: Tensor, j: int) -> bool:
        return (
            self._kinds[i] == self._kinds[j]
            and a.data_ptr() + a.numel() * a.element_size() == b.data_ptr()
            and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        )
