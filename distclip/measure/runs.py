"""Runs: gradients that lie side by side in memory, taken as one tensor.

DDP and FSDP hand out gradients as adjacent views of a few flat buffers. What counts alike (same slot, same
multiplicity) and lies exactly adjacent is measured and changed in one go: 80 kernel calls instead of 720.
Padding between views is never read. The buffers move from step to step, so what is kept is how the
gradients lie relative to each other, checked by their addresses; the views are made anew, since keeping
them would keep the gradients' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_, itemgetter, sub
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.layout.memory import MEASURABLE, lie_apart
from distclip.layout.placement import distinct
from distclip.measure.gradients import Bucket, Gradients, collect
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_tensor, spec


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of one bucket.

    Attributes:
        first: of each run, its first member.
        parameters: of these, the parameters.
        merged: runs of several members, and their numbers of elements.
    """

    first: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    merged: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the gradients of one step lay.

    Attributes:
        absent: parameters without a gradient.
        take: from what is listed by parameter, that of the members: those with elements on this rank, as they
            lie in memory.
        sharded: of the members, those whose gradients are DTensors, by position; specs: their spec objects.
        dtypes: of the members; complex: whether any of them is.
        first_of: by member, the first member of its run; offsets: its distance from that, in bytes.
        firsts: the first members; sizes: bytes of their runs, whose members lie apart.
        buckets: the runs, by device and dtype.
    """

    absent: list[int]
    take: Callable[[Sequence[Any]], list[Any]]
    sharded: list[int]
    specs: list[Any]
    dtypes: list[torch.dtype]
    first_of: list[int]
    offsets: list[int]
    firsts: list[int]
    sizes: list[int]
    complex: bool
    buckets: list[_Runs]


# Everything per gradient is a loop inside Python's C code: with 720 of them that is half of the time. The
# flag of lazy negation is not looked at where nothing is complex: it changes neither norms nor multiples.
_gradient = attrgetter("grad")
_dtype = attrgetter("dtype")
_device = attrgetter("device")
_storage_layout = attrgetter("layout")
_nested = attrgetter("is_nested")


class Collector:
    """:func:`collect`, step after step, with runs merged.

    Args:
        kinds: by parameter; adjacent gradients of equal kind may come as one tensor.
    """

    def __init__(self, plan: Plan, kinds: Sequence[Hashable]) -> None:
        self._plan, self._kinds = plan, kinds
        # Gradients that may have to be summed first are looked at one by one.
        self._mergeable = not plan.partial and not any(p.partial for p in distinct(plan.placements))
        self._layout: _Layout | None = None
        self._calls = 0
        self._parameters_of = _picker(plan.positions)

    def __call__(self, tensors: Sequence[Tensor]) -> Gradients:
        if torch.compiler.is_compiling():
            return collect(self._plan, tensors)  # addresses mean nothing there
        parameters = self._parameters_of(tensors)
        self._calls += 1
        # Another thread may put another layout there at any time: it is read and written once.
        layout = self._layout
        if self._calls & (self._calls - 1) == 0:
            layout = None  # gradients that were apart may lie side by side by now
        gradients: list[Any] = list(map(_gradient, parameters))
        locals_ = None if layout is None else _lie_as_before(layout, gradients)
        if locals_ is None:
            layout, locals_ = self._look_at(gradients) if self._mergeable else (None, None)
            self._layout = layout
        if layout is None or locals_ is None:
            return collect(self._plan, tensors)
        buckets = []
        for runs in layout.buckets:
            whole = [locals_[n] for n in runs.first]
            for i, numel in runs.merged:
                whole[i] = whole[i].as_strided((numel,), (1,))
            buckets.append(Bucket(whole, runs.parameters))
        return Gradients(parameters, buckets)

    def _look_at(self, gradients: list[Any]) -> tuple[_Layout, list[Tensor]] | tuple[None, None]:
        """How the gradients lie, and the members' local ones; None if any cannot simply be taken as it is."""
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        locals_: list[Any] = [gradients[i] for i in present]
        specs: list[Any] = [None] * len(present)
        placements = self._plan.placements
        for n, is_sharded in enumerate(map(isinstance, locals_, repeat(DTensor))):
            if is_sharded:
                specs[n], locals_[n] = spec(locals_[n]), local_tensor(locals_[n])
                if specs[n].placements != placements[present[n]].torch_placements:
                    return None, None
            elif placements[present[n]].mesh is not None:
                return None, None
        if not _are_simple(locals_):
            return None, None
        numels, addresses = list(map(Tensor.numel, locals_)), list(map(Tensor.data_ptr, locals_))
        dtypes = list(map(_dtype, locals_))
        ends = [a + n * d.itemsize for a, n, d in zip(addresses, numels, dtypes, strict=True)]
        numbers: dict[tuple[torch.device, torch.dtype], int] = {}
        kinds = zip(map(_device, locals_), dtypes, strict=True)
        bucket_of = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
        keys = [bucket << 64 | address for bucket, address in zip(bucket_of, addresses, strict=True)]
        order = sorted([n for n, numel in enumerate(numels) if numel], key=keys.__getitem__)
        sizes = [ends[n] - addresses[n] for n in order]
        if not _lie_apart([addresses[n] for n in order], sizes):
            return None, None

        begins: list[int] = []  # of the runs, positions in order
        before = -1
        for position, n in enumerate(order):
            adjacent = before >= 0 and ends[before] == addresses[n] and bucket_of[before] == bucket_of[n]
            if not adjacent or self._kinds[present[before]] != self._kinds[present[n]]:
                begins.append(position)
            before = n
        members, locals_, addresses, ends, bucket_of = (
            [column[n] for n in order] for column in (present, locals_, addresses, ends, bucket_of)
        )
        begins = _apart_by_owner(begins, locals_, addresses, ends)
        spans = list(_spans(begins, len(order)))
        first_of = [begin for begin, end in spans for _ in range(begin, end)]
        of_bucket = [_Runs() for _ in numbers]
        # In the order of the parameters, wherever they lie: all ranks then add in the same order, and what is
        # kept on the device for a list of runs fits again.
        heads = [members[begin] for begin in begins]
        for i in sorted(range(len(heads)), key=heads.__getitem__):
            begin, end = spans[i]
            runs = of_bucket[bucket_of[begin]]
            if end - begin > 1:
                numel = (ends[end - 1] - addresses[begin]) // locals_[begin].element_size()
                runs.merged.append((len(runs.first), numel))
            runs.first.append(begin)
            runs.parameters.append(members[begin])
        here = set(present)
        layout = _Layout(
            absent=[i for i in range(len(gradients)) if i not in here],
            take=_picker(members),
            sharded=[position for position, n in enumerate(order) if specs[n] is not None],
            specs=[specs[n] for n in order if specs[n] is not None],
            dtypes=[dtypes[n] for n in order],
            first_of=first_of,
            firsts=begins,
            sizes=[ends[end - 1] - addresses[begin] for begin, end in spans],
            offsets=[address - addresses[first] for address, first in zip(addresses, first_of, strict=True)],
            complex=any(dtype.is_complex for dtype in set(dtypes)),
            buckets=[runs for runs in of_bucket if runs.first],
        )
        return layout, locals_


def _are_simple(locals_: list[Any]) -> bool:
    """Whether all can be measured and changed where they lie: contiguous, and nothing lazy."""
    return (
        not set(map(type, locals_)) - {Tensor}
        and not set(map(_storage_layout, locals_)) - {torch.strided}
        and all(map(Tensor.is_contiguous, locals_))
        and not any(map(Tensor.is_conj, locals_))
        and not any(map(Tensor.is_neg, locals_))
        and not any(map(_nested, locals_))
        and MEASURABLE.issuperset(map(_dtype, locals_))
    )


def _lie_apart(addresses: list[int], sizes: list[int]) -> bool:
    """Whether no gradient shares memory with another (tied or aliased), and all have addresses."""
    return 0 not in addresses and lie_apart(addresses, sizes)


def _spans(begins: list[int], end: int) -> Iterator[tuple[int, int]]:
    return zip(begins, [*begins, end][1:], strict=True)


def _apart_by_owner(
    begins: list[int], locals_: list[Tensor], addresses: list[int], ends: list[int]
) -> list[int]:
    """The beginnings, and more where tensors are adjacent by chance only, in memory of different owners."""
    more = []
    for begin, end in _spans(begins, len(locals_)):
        if end - begin > 1 and _room(locals_[begin]) < ends[end - 1] - addresses[begin]:
            owners = [tensor.untyped_storage().data_ptr() for tensor in locals_[begin:end]]
            more += [begin + i for i in range(1, end - begin) if owners[i] != owners[i - 1]]
    return sorted(begins + more) if more else begins


def _room(tensor: Tensor) -> int:
    """Bytes from the first element of the tensor to the end of its memory."""
    return tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.element_size()


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
    """From a list, those at ``positions``, in a loop of C."""
    if len(positions) < 2:
        return lambda items: [items[i] for i in positions]
    pick = itemgetter(*positions)
    return lambda items: list(pick(items))


def _lie_as_before(layout: _Layout, gradients: list[Any]) -> list[Tensor] | None:
    """The members' local gradients, or None where they do not lie so any more."""
    for i in layout.absent:
        if gradients[i] is not None:
            return None
    members = layout.take(gradients)
    if layout.sharded:
        found = members if len(layout.sharded) == len(members) else [members[i] for i in layout.sharded]
        if not all(map(isinstance, found, repeat(DTensor))):
            return None
        if not all(map(is_, map(spec, found), layout.specs)) and any(
            here.placements != before.placements
            for here, before in zip(map(spec, found), layout.specs, strict=True)
        ):
            return None
        if found is members:
            members = list(map(local_tensor, members))
        else:
            for i in layout.sharded:
                members[i] = local_tensor(members[i])
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
    if not _lie_apart(list(map(addresses.__getitem__, layout.firsts)), layout.sizes):
        return None
    for runs in layout.buckets:
        for i, numel in runs.merged:
            first = members[runs.first[i]]
            if _room(first) < numel * first.element_size():
                return None
    return members
