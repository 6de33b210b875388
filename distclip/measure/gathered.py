"""The sums gathered in backward, and whether each is still that of its gradient.

With each goes what tells, at the clip, whether the gradient is still what was measured: the object that
``.grad`` held, where its elements lay, its version, and on the CPU the proof that nothing has written there
since, by whatever name (``torch_private.writes``). All of it is noted when a gradient is measured, not
later, so nothing that happens in backward after that can pass for measured; and what does not tell this any
more is measured at the clip. So the norm is that of ``.grad`` as it is then, whatever accumulates into it,
replaces it or takes it away.

What is written outside torch's kernels is beyond this: through a NumPy array or a raw pointer that was taken
before. And accelerators have no such proof, only versions, which ``p.grad.data``, ``GradScaler.unscale_`` and
collectives pass by: there a few elements of some gradients are kept too, and where these have changed, the
norm becomes NaN (the host would have to wait to know). ``torch.autograd.graph.increment_version(p.grad)``
tells.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip import kernels
from distclip.decide.transfer import on_device
from distclip.layout.memory import MEASURABLE, Region, lie_apart
from distclip.measure.reduction import local_of
from distclip.planning.plan import Plan
from distclip.torch_private.autograd import version
from distclip.torch_private.dtensor import spec
from distclip.torch_private.writes import Mark, addresses, can_be_proven, is_marked, mark

_SAMPLED = 4  # gradients, 16 elements of each

_gradient = attrgetter("grad")
_kind = attrgetter("layout", "dtype", "is_nested", "is_meta", "is_quantized")


class Gathered:
    """``Σ|g|^p`` of this rank's part of each gradient of a plan, measured in any order.

    Attributes:
        parameters: of the plan.
    """

    def __init__(
        self, plan: Plan, tensors: Sequence[Tensor], norm_type: float, accumulate: torch.dtype
    ) -> None:
        self.parameters = [tensors[i] for i in plan.positions]
        self._norm_type, self._accumulate, self._device = norm_type, accumulate, plan.device
        self._wide = plan.wide and bool(kernels.distance(norm_type))
        n = len(self.parameters)
        with torch.inference_mode(mode=False):  # it is written to outside as well
            self._sums = torch.zeros(n, dtype=torch.float64, device=plan.device)
        self._counted = [False] * n  # whether the sum may be more than 0
        # Of what has been measured, by parameter:
        self._measured: list[Callable[[], Tensor | None]] = [_nothing] * n  # the gradient, while it lives
        self._addresses, self._sizes = [0] * n, [0] * n  # the first byte, and bytes up to the last
        self._versions, self._outer_versions = [0] * n, [0] * n
        self._marks: list[Mark | None] = [None] * n
        self._sampled: list[tuple[int, Tensor]] = []
        self._sharded = {i for i, p in enumerate(self.parameters) if isinstance(p, DTensor)}
        self._placements = [p.torch_placements for p in plan.placements]
        self._specs: list[Any] = [None] * n  # that were found to be in order
        self._indices: dict[tuple[int, ...], Tensor] = {}

    # --- measuring -------------------------------------------------------------------------------------

    def measure_and_note(self, parameters: Sequence[int], gradients: Sequence[Any]) -> None:
        """Measures those that can be; the others count as not measured."""
        noted: list[tuple[int, Tensor]] = []
        for i, gradient in zip(parameters, gradients, strict=True):
            self.drop(i)
            if is_simple(local_of(gradient)) and self._lies_as_its_parameter(i, gradient):
                noted.append((i, gradient))
        self.note(noted)
        try:
            self.measure(parameters, gradients)
        except BaseException:
            self.forget()
            raise

    def note(self, gradients: Sequence[tuple[int, Tensor]]) -> None:
        """These are what is measured. Before they are read: what is written later can be told then."""
        locals_ = [local_of(gradient) for _, gradient in gradients]
        for (i, gradient), local, place in zip(gradients, locals_, addresses(locals_), strict=True):
            if local.is_inference():  # has no version
                continue
            found = mark(local) if can_be_proven(local) else None
            if found is None and can_be_proven(local):
                continue
            self._marks[i] = found
            self._addresses[i], self._sizes[i] = place, _size_of(local)
            self._versions[i], self._outer_versions[i] = version(local), version(gradient)
            # (A DTensor that is referred to weakly could not be swapped: module.to() does that.)
            self._measured[i] = weakref.ref(local)

    @torch.no_grad()
    def measure(self, parameters: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Those that can be. What they are is another's to note."""
        together: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        empty: list[int] = []
        for i, gradient in zip(parameters, gradients, strict=True):
            local = local_of(gradient)
            if not is_simple(local):
                continue
            if not local.numel():
                empty.append(i)
                continue
            members, tensors = together.setdefault((local.device, local.dtype), ([], []))
            members.append(i)
            tensors.append(local)
            self._counted[i] = True
        for members, tensors in together.values():
            self._put(members, kernels.power_sums(tensors, self._norm_type, self._accumulate))
        self._put_zero(empty)

    def _put(self, parameters: Sequence[int], sums: Tensor) -> None:
        key = tuple(parameters)
        if key not in self._indices:
            if len(self._indices) >= 1024:
                self._indices.clear()
            self._indices[key] = on_device(key, torch.int64, self._device)
        self._sums.index_copy_(0, self._indices[key], sums.to(self._device))

    def _put_zero(self, parameters: Sequence[int]) -> None:
        gone = [i for i in parameters if self._counted[i]]
        if gone:
            self._put(gone, torch.zeros(len(gone), dtype=torch.float64, device=self._device))
            for i in gone:
                self._counted[i] = False

    # --- at the clip -----------------------------------------------------------------------------------

    def drop(self, i: int) -> None:
        """Gradient i is about to change: what was measured of it counts no more."""
        self._measured[i] = _nothing

    def forget(self) -> None:
        """The gradients have been changed: what was measured counts no more."""
        self._measured = [_nothing] * len(self._measured)
        self._sampled = []

    @torch.no_grad()
    def sums(self) -> Tensor | None:
        """``Σ|g|^p`` (``max|g|``) of this rank's part of each gradient as it is, [num_parameters] float64.

        None where gradients share memory, are no plain strided tensors, have yet to be summed, or are float64
        and their sums may be more than that holds: those are collected and measured in the usual way.
        """
        gradients: list[Any] = list(map(_gradient, self.parameters))
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found = gradients if len(there) == len(gradients) else [gradients[i] for i in there]
        locals_ = list(map(local_of, found)) if self._sharded else found
        measured = [then() for then in self._of(there, self._measured)]
        replaced = []
        if not all(map(is_, measured, locals_)):
            replaced = [i for i, then, now in zip(there, measured, locals_, strict=True) if then is not now]
            if not all(is_simple(local_of(gradients[i])) for i in replaced):
                return None
        places = addresses(locals_)
        if replaced:
            new = set(replaced)
            kept = [n for n, i in enumerate(there) if i not in new]
            same: list[list[Any]] = [[column[n] for n in kept] for column in (there, found, locals_, places)]
            changed = sorted([*replaced, *self._written(*same)])
        else:
            changed = self._written(there, found, locals_, places)
        untouched = self._untouched(set(changed)) if self._sampled else True
        if untouched is False:
            self.forget()
            changed = there
        if len(there) < len(gradients):
            self._put_zero([i for i, gradient in enumerate(gradients) if gradient is None])
        anew = [gradients[i] for i in changed]
        for i, gradient in zip(changed, anew, strict=True):
            self._sizes[i] = _size_of(local_of(gradient))
        apart = _lie_apart(places, self._of(there, self._sizes))
        if not apart or not all(map(self._lies_as_its_parameter, changed, anew)):
            return None
        if changed:
            self.measure_and_note(changed, anew)
        if self._wide:  # of sums that float64 does not hold, others are needed
            largest = kernels.look(self._sums.amax()) if self._sums.numel() else [0.0]
            if largest is None or not largest[0] < math.inf:
                return None
        return torch.where(untouched, self._sums, torch.nan) if isinstance(untouched, Tensor) else self._sums

    def _written(
        self, there: list[int], gradients: list[Any], locals_: list[Any], places: list[int]
    ) -> list[int]:
        """Those of ``there`` that may not hold what was measured. Mostly in loops inside Python's C code."""
        marks = self._of(there, self._marks)
        columns = [places, list(map(version, locals_))]
        noted = [self._of(there, self._addresses), self._of(there, self._versions)]
        if self._sharded:  # operators on a DTensor change its own version, others that of its local tensor
            columns.append(list(map(version, gradients)))
            noted.append(self._of(there, self._outer_versions))
        proven = all(mark is not None and mark.holds for mark in set(marks))
        if columns == noted and proven and all(map(is_marked, locals_)):
            return []
        now, then = zip(*columns, strict=True), zip(*noted, strict=True)
        return [
            i
            for i, local, mark, state, before in zip(there, locals_, marks, now, then, strict=True)
            if state != before or not (mark is None or (mark.holds and is_marked(local)))
        ]

    def _of(self, there: list[int], column: list[Any]) -> list[Any]:
        return column if len(there) == len(column) else [column[i] for i in there]

    def _lies_as_its_parameter(self, i: int, gradient: Any) -> bool:
        if i in self._sharded and (now := spec(gradient)) is not self._specs[i]:
            if now.placements != self._placements[i]:
                return False
            self._specs[i] = now
        return True

    # --- samples, where there is no proof --------------------------------------------------------------

    @torch.no_grad()
    def keep_samples(self) -> None:
        """Of the gradients as they are at the end of a backward pass."""
        uncertain = [i for i, m in enumerate(self._marks) if m is None and self._measured[i] is not _nothing]
        if not uncertain:
            return
        chosen = uncertain[:: max(1, len(uncertain) // _SAMPLED)]
        there = [(i, self.parameters[i].grad) for i in chosen]
        self._sampled = [(i, _some_of(g).clone()) for i, g in there if g is not None]

    def _untouched(self, changed: set[int]) -> Tensor | bool:
        """Whether the samples of the gradients that seem unchanged are; on an accelerator as [] bool."""
        kept = [
            (sample, _some_of(gradient))
            for i, sample in self._sampled
            if i not in changed and (gradient := self.parameters[i].grad) is not None
        ]
        if not kept:
            return True
        # Their bytes: NaN is no other NaN.
        now = torch.cat([elements.view(torch.uint8) for _, elements in kept])
        then = torch.cat([sample.view(torch.uint8) for sample, _ in kept])
        return torch.equal(now, then) if now.is_cpu else (now == then).all()


def _size_of(local: Tensor) -> int:
    """Bytes from its first element to its last."""
    if local.is_contiguous():
        return local.numel() * local.element_size()
    region = Region.of(local)
    return region.end - region.begin


def _lie_apart(places: list[int], sizes: list[int]) -> bool:
    """Whether no gradient shares memory with another, as far as that is quickly told."""
    if 0 in sizes:  # empty ones may lie anywhere
        places = [place for place, size in zip(places, sizes, strict=True) if size]
        sizes = list(filter(None, sizes))
    return lie_apart(places, sizes)


def _nothing() -> None:
    """In place of the reference to a gradient that was measured."""


def is_simple(local: Tensor) -> bool:
    """Whether it can be measured here: plain, strided, and what its memory holds."""
    return (
        type(local) is Tensor and _is_simple_kind(*_kind(local)) and not (local.is_conj() or local.is_neg())
    )


@lru_cache(maxsize=256)
def _is_simple_kind(
    layout: torch.layout, dtype: torch.dtype, is_nested: bool, is_meta: bool, is_quantized: bool
) -> bool:
    strided = layout is torch.strided and not (is_nested or is_meta or is_quantized)
    return strided and dtype in MEASURABLE


def _some_of(gradient: Tensor) -> Tensor:
    """[≤ 16]: a view of the elements of a gradient that are kept."""
    some = local_of(gradient)
    if some.is_contiguous():
        return some.as_strided((min(16, some.numel()),), (1,))
    while some.dim() > 1:
        some = some.select(0, 0)
    return some[:16]
