"""Which gradients are not finite, and on which ranks. Only on request: this waits, and gathers objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.measure.reduction import wait
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_of

_NAMED = 5  # parameters in a message


def nonfinite_ranks(
    plan: Plan, tensors: Sequence[Tensor], group: dist.ProcessGroup | None
) -> dict[str, tuple[int, ...]]:
    """The ranks of ``group`` that hold NaN or infinite elements of a gradient, by the name of its parameter.

    Each of them calls it, or none. ``group``: None asks no other rank.
    """
    gradients = [tensors[i].grad for i in plan.positions]
    mine = [row for row, g in zip(plan.rows, gradients, strict=True) if g is not None and not _is_finite(g)]
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    everyone = [(rank, mine)]
    if group is not None:
        everyone *= group.size()
        dist.all_gather_object(everyone, (rank, mine), group=group)
    return {
        name: ranks
        for row, name in enumerate(plan.names)
        if (ranks := tuple(sorted(rank for rank, rows in everyone if row in rows)))
    }


def say_where(found: dict[str, tuple[int, ...]]) -> str:
    """A sentence about what :func:`nonfinite_ranks` found."""
    if not found:
        return "every element is finite: it is their power sum that exceeds the range of float64"
    said = [f"{name!r} on rank(s) {', '.join(map(str, ranks))}" for name, ranks in found.items()]
    more = f", and {len(said) - _NAMED} more (clipper.find_nonfinite())" if len(said) > _NAMED else ""
    return f"not finite: {'; '.join(said[:_NAMED])}{more}"


def _is_finite(gradient: Tensor) -> bool:
    local = wait(local_of(gradient))
    return bool(torch.isfinite(local if local.layout is torch.strided else local.coalesce().values()).all())
