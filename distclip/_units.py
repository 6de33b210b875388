"""Units: the rows of every parameter, each with a norm of its own.

A unit is a row of dim 0 of the whole parameter, or the whole of a parameter with one dim or none. A rank may
hold whole units, parts of units (sharded over another dim), or a flat stretch that begins and ends within one
(FSDP1): whatever it holds is looked at as tensors whose rows are consecutive units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distclip._gradients import Bucket, Gradients
from distclip._placement import MANAGED, Declaration, Placement, Stretch
from distclip._plan import Plan
from distclip._reduction import local_of, reduce_message

# float32 sums over longer rows lose digits (see _kernels.foreach).
_LONG_ROW = 512


@dataclass(frozen=True, eq=False)
class Units:
    """The slots of a unit-wise strategy.

    Attributes:
        size: units of all parameters of all stages.
        starts: first unit of each parameter of all stages.             # [num_parameters of all stages]
        stretches: what this rank holds of each of its own parameters.  # [num_parameters]
    """

    size: int
    starts: tuple[int, ...]
    stretches: tuple[tuple[Stretch, ...], ...]
    own: tuple[int, ...]  # first unit of each of this rank's parameters   # [num_parameters]

    @staticmethod
    def of(plan: Plan, tensors: Sequence[Tensor]) -> Units:
        """
        Raises:
            ValueError: a plain parameter of several dims is declared sharded, which does not say along which
                dim, so neither whether its rows are whole.
        """
        ends = list(accumulate(p.units for p in plan.every))
        starts = tuple(end - p.units for end, p in zip(ends, plan.every, strict=True))
        stretches = []
        for info, placement, position in zip(plan.parameters, plan.placements, plan.positions, strict=True):
            stretches.append(_stretches(info.name, tensors[position], placement))
        return Units(
            ends[-1] if ends else 0, starts, tuple(stretches), tuple(starts[row] for row in plan.rows)
        )

    def power_sums(
        self, plan: Plan, gradients: Gradients, tensors: Sequence[Tensor], *, outdated: bool = False
    ) -> Tensor:
        """[2, num_units] float64, reduced over all ranks: ``Σ g²`` and ``Σ w²`` of each unit."""
        message = torch.zeros(2, self.size, dtype=torch.float64, device=plan.device)
        for bucket in gradients.buckets:
            for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
                share = 1.0 / plan.multiplicities[i]
                weight = local_of(tensors[plan.positions[i]]).detach()
                for rows, (of_gradient, of_weight) in self._rows(i, gradient, weight):
                    message[0, rows] += _squares(of_gradient).to(plan.device) * share
                    message[1, rows] += _squares(of_weight).to(plan.device) * share
        return reduce_message(message, 2.0, plan.group_name, outdated=outdated)

    def scale_(self, bucket: Bucket, coefficient: Tensor) -> None:
        """Multiply each unit by its own coefficient, [num_units] float32."""
        coefficient = coefficient.to(bucket.tensors[0].device)
        for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
            for rows, (part,) in self._rows(i, gradient):
                part.mul_(coefficient[rows].view(-1, *[1] * (part.dim() - 1)))

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
        _, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return (Stretch((), offsets[0]),)
    if placement.shards:
        raise ValueError(
            f"{name} is {placement.label}, which does not say along which dim: unit-wise clipping cannot "
            "tell whether its rows are whole. Make it a DTensor (distribute_tensor, or DTensor.from_local)."
        )
    return (Stretch((), 0),)


def _squares(rows: Tensor) -> Tensor:
    """[rows] float64."""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    length = rows[0].numel()
    accumulate_in = torch.float64 if length > _LONG_ROW or rows.dtype == torch.float64 else torch.float32
    dims = list(range(1, rows.dim()))
    norms: Tensor = torch.linalg.vector_norm(rows, 2, dims, dtype=accumulate_in)
    return norms.double().square_()
