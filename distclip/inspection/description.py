"""A plan as a table for people: what lies where, and what it is counted as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.decide.terminal import shown
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_of


@dataclass(frozen=True)
class Row:
    """One parameter of this rank."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    dtype: torch.dtype
    placement: str
    ranks: int  # that its sum is reduced over
    multiplicity: int  # of those ranks, how many hold each element
    local_elements: int


@dataclass(frozen=True)
class Description:
    """What ``print(clipper.describe())`` shows.

    Attributes:
        rows: the parameters of this rank.
        counted: elements that the norm counts, over all ranks, each once.
        elements: elements of this model, as the parameters' own shapes have it; None where some are
            declared shards or in other stages, whose whole is known from the counting alone.
    """

    rows: tuple[Row, ...]
    counted: int
    elements: int | None

    def __str__(self) -> str:
        header = ("parameter", "shape", "dtype", "placement", "ranks", "held by")
        body = [
            (
                row.name,
                "×".join(map(str, row.shape)) or "scalar",
                str(row.dtype).removeprefix("torch."),
                row.placement,
                str(row.ranks),
                str(row.multiplicity),
            )
            for row in self.rows
        ]
        widths = [max(len(cells[i]) for cells in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in [header, tuple("-" * width for width in widths), *body]
        ]
        of = "" if self.elements is None else f" of {self.elements:,}"
        lines.append(f"{len(self.rows)} parameters on this rank; {self.counted:,}{of} elements counted")
        return shown("\n".join(lines))


def describe(plan: Plan, tensors: list[Tensor]) -> Description:
    """Describe a plan. One all-reduce where ranks hold different parts: every rank calls it, or none."""
    group = plan.group
    ranks = 1 if group is None else group.size()
    rows = []
    for position, info, placement, multiplicity in zip(
        plan.positions, plan.parameters, plan.placements, plan.multiplicities, strict=True
    ):
        tensor = tensors[position]
        local = local_of(tensor)
        held = multiplicity if group is not None else 1
        rows.append(
            Row(info.name, tuple(info.shape), tensor.dtype, placement.label, ranks, held, local.numel())
        )
    message = torch.tensor(
        [sum(row.local_elements / row.multiplicity for row in rows)], dtype=torch.float64, device=plan.device
    )
    if group is not None:
        dist.all_reduce(message, group=group)
    whole = plan.scope.stages is None and all(
        placement.home is not None or not placement.shards for placement in plan.placements
    )
    elements = sum(torch.Size(row.shape).numel() for row in rows) if whole else None
    return Description(tuple(rows), round(message.item()), elements)
