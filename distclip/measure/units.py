"""Units: the rows of every parameter, each with a norm of its own.

A unit is a row of dim 0 of the whole parameter, or the whole of a parameter with one dim or none. A rank may
hold whole units, parts of units (sharded over another dim), or a flat stretch that begins and ends within one
(FSDP1): whatever it holds is looked at as tensors whose rows are consecutive units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip import kernels
from distclip.decide.norms import regroup
from distclip.layout.memory import is_bare
from distclip.layout.placement import MANAGED, Declaration, Placement, Stretch
from distclip.measure.gradients import Bucket, Gradients
from distclip.measure.reduction import News, reduce_message
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_of, offsets

# float32 sums over longer rows lose digits, as do those of squares below this (see kernels.foreach).
_LONG_ROW = 512
_FAINT = 2.0**-100


@dataclass(frozen=True, eq=False)
class Units:
    """The slots of a unit-wise strategy.

    Attributes:
        size: units of all parameters of all stages.
        starts: first unit of each parameter of all stages.             # [num_parameters of all stages]
        stretches: what this rank holds of each of its own parameters.  # [num_parameters]
        distance: by which squares travel beside those of the gradients, where these may leave float64.
    """

    size: int
    starts: tuple[int, ...]
    stretches: tuple[tuple[Stretch, ...], ...]
    own: tuple[int, ...]  # first unit of each of this rank's parameters   # [num_parameters]
    distance: int

    @staticmethod
    def of(plan: Plan, tensors: Sequence[Tensor]) -> Units:
        """
        Raises:
            ValueError: a parameter has no elements that can be read; or a plain one of several dims is
                declared sharded, which does not say along which dim, so neither whether its rows are whole.
        """
        ends = list(accumulate(p.units for p in plan.every))
        starts = tuple(end - p.units for end, p in zip(ends, plan.every, strict=True))
        stretches = []
        for info, position in zip(plan.parameters, plan.positions, strict=True):
            if not is_bare(local_of(tensors[position])):
                raise ValueError(
                    f"{info.name} is a {type(local_of(tensors[position])).__name__}, whose elements its own "
                    "operators alone know: unit-wise clipping cannot measure its rows. Leave it out, or clip "
                    "by another strategy"
                )
        for info, placement, position in zip(plan.parameters, plan.placements, plan.positions, strict=True):
            stretches.append(_stretches(info.name, tensors[position], placement))
        return Units(
            ends[-1] if ends else 0,
            starts,
            tuple(stretches),
            tuple(starts[row] for row in plan.rows),
            kernels.distance(2.0) if plan.wide else 0,
        )

    def power_sums(
        self, plan: Plan, gradients: Gradients, tensors: Sequence[Tensor], *, news: News | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[num_units] float64 each, reduced over all ranks: ``Σ g²`` and ``Σ w²`` of each unit, and
        ``Σ (g/2^distance)²`` where there is a distance."""
        message = torch.zeros(3 if self.distance else 2, self.size, dtype=torch.float64, device=plan.device)
        for bucket in gradients.buckets:
            for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
                share = 1.0 / plan.multiplicities[i]
                weight = local_of(tensors[plan.positions[i]]).detach()
                for line, units, squares in self._squares(i, gradient, weight, gradients.rows.get(i)):
                    message[line, units] += squares.to(plan.device) * share
        message = reduce_message(message, 2.0, plan.group_name, news=news or News())
        return message[0], message[1], message[2] if self.distance else None

    def _squares(
        self, i: int, gradient: Tensor, weight: Tensor, rows: Tensor | None
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Lines of the message, units, and what is to be added there."""
        measures: dict[int, Callable[[Tensor], Tensor]] = {0: _squares}
        if self.distance:
            measures[2] = partial(_far_squares, distance=self.distance)
        if rows is None or self.stretches[i][0].row is None:
            for units, (of_gradient, of_weight) in self._rows(i, gradient, weight):
                yield from ((line, units, measure(of_gradient)) for line, measure in measures.items())
                yield 1, units, _squares(of_weight)
            return
        units = self._all(i, weight)
        for line, measure in measures.items():
            yield line, units, regroup(measure(gradient), rows, weight.size(0), 2.0)
        of_weight = _squares(weight.index_select(0, rows))
        yield 1, units, of_weight.new_zeros(weight.size(0)).index_copy_(0, rows, of_weight)

    def scale_(self, bucket: Bucket, coefficient: Tensor, rows: Mapping[int, Tensor]) -> None:
        """Multiply each unit by its own coefficient, [num_units] float32 or float64. ``rows``: of sparse
        gradients."""
        coefficient = coefficient.to(bucket.tensors[0].device)
        for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
            if i in rows and self.stretches[i][0].row is not None:
                first = self.own[i] + self.stretches[i][0].unit
                kernels.scale_rows_(gradient, coefficient[first + rows[i]])
                continue
            for units, (part,) in self._rows(i, gradient):
                kernels.scale_rows_(part, coefficient[units])

    def _all(self, i: int, weight: Tensor) -> slice:
        """The units of what this rank holds of a parameter."""
        first = self.own[i] + self.stretches[i][0].unit
        return slice(first, first + weight.size(0))

    def _rows(self, i: int, *tensors: Tensor) -> list[tuple[slice, list[Tensor]]]:
        """Consecutive units, and of each tensor what this rank holds of them: dim 0 is the unit."""
        found = []
        for stretch in self.stretches[i]:
            for unit, count, views in stretch.rows(tensors):
                first = self.own[i] + unit
                found.append((slice(first, first + count), views))
        return found


def _stretches(name: str, parameter: Tensor, placement: Placement) -> tuple[Stretch, ...]:
    managed: Declaration | None = getattr(parameter, MANAGED, None)
    if managed is not None and managed.stretches is not None:
        return managed.stretches
    if parameter.dim() <= 1:
        return (Stretch(None, 0),)
    if isinstance(parameter, DTensor):
        return (Stretch((), offsets(parameter)[0]),)
    if placement.shards:
        raise ValueError(
            f"{name} is {placement.label}, which does not say along which dim: unit-wise clipping cannot "
            "tell whether its rows are whole. Make it a DTensor (distribute_tensor, or DTensor.from_local)."
        )
    return (Stretch((), 0),)


def _squares(rows: Tensor) -> Tensor:
    """[rows] float64: the sum of squares of each."""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    if rows.dim() == 1:
        rows = rows.unsqueeze(1)
    dims, length = list(range(1, rows.dim())), math.prod(rows.shape[1:])
    wide = length > _LONG_ROW or rows.dtype == torch.float64 or not rows.is_cpu
    wide = wide or torch.compiler.is_compiling()
    norms: Tensor = torch.linalg.vector_norm(rows, 2, dims, dtype=torch.float64 if wide else torch.float32)
    squares = norms.double().square_()
    if not wide:
        faint = _FAINT * length
        found = [j for j, each in enumerate(kernels.look(squares) or ()) if not faint <= each < math.inf]
        if found:  # squares that overflow float32, or vanish in it
            chosen = torch.tensor(found, dtype=torch.int64, device="cpu")
            again = torch.linalg.vector_norm(rows.index_select(0, chosen), 2, dims, dtype=torch.float64)
            squares.index_copy_(0, chosen, again.square_())
    return squares


def _far_squares(rows: Tensor, *, distance: int) -> Tensor:
    """[rows] float64: of the rows / 2^distance."""
    if rows.dtype in (torch.float64, torch.complex128):
        return _squares(rows * 2.0**-distance)
    # By two factors: the whole is no normal number.
    return _squares(rows) * 2.0**-distance * 2.0**-distance
