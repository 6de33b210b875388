"""The fault that is told: the first thing in which ranks differ that should hold copies, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from distclip.layout.placement import Placement
from distclip.layout.scope import Scope
from distclip.planning.agreement import REMEDIES
from distclip.planning.evidence import COLUMNS, MOST_TIED


def find_fault(high: Tensor, spread: Tensor) -> tuple[str, list[int]] | None:
    """What differs, and in which rows. ``high``, ``spread``: of the evidence of all ranks, the largest and
    how far that is from the least."""
    for what, columns, tolerance in COLUMNS:
        differing = (spread[:, columns] > tolerance).any(dim=1).nonzero().flatten().tolist()
        if differing:
            return what, differing
    return _fault_of_ties(high)


def _fault_of_ties(high: Tensor) -> tuple[str, list[int]] | None:
    """Tied copies, each in the rows of its own stage: are all there, and equal?"""
    by_tie: dict[int, list[int]] = {}
    for row, tie in enumerate(high[:, 2].tolist()):
        if tie > 0:
            by_tie.setdefault(int(tie), []).append(row)
    for tie, rows in by_tie.items():
        if len(rows) != tie % MOST_TIED:
            return "tied_over= declaration", rows
        for what, columns, tolerance in COLUMNS[3:]:
            copies = high[rows, columns]
            if copies.isfinite().all() and ((copies.amax(0) - copies.amin(0)) > tolerance).any():
                return f"tied {what}", rows
    return None


def explain(
    what: str,
    differing: Sequence[int],
    names: Sequence[str],
    offset: int,
    placements: Sequence[Placement],
    scope: Scope,
) -> str:
    own = next((row for row in differing if offset <= row < offset + len(placements)), None)
    label = "held by another stage" if own is None else placements[own - offset].label
    name = names[differing[0] if own is None else own]
    shown = f"parameter {name!r} ({label}; seen on rank {dist.get_rank()})"
    others = f" {len(differing)} parameters are affected." if len(differing) > 1 else ""
    if what == "tied_over= declaration":
        return (
            f"{shown} is not declared alike by all that hold it: each of the tied stages declares "
            f"tied_over= with the same ranks, and its tied parameters in the same order.{others}"
        )
    if what.startswith("tied"):
        return (
            f"the {what.removeprefix('tied ')} of {shown} differs between the stages that it is tied over."
            f"{others} Tied copies start equal, and their gradients are summed over the group before they "
            "are clipped."
        )
    if what == "gradient":
        return (
            f"the gradient of {shown} differs between ranks that should hold copies of it, though its value "
            f"is the same.{others} If these are replicas, their gradients have not been synchronised: clip "
            "outside no_sync(), after the last micro-batch, and wrap the model in DDP or FSDP (or declare "
            f"partial_over= and leave the sum to distclip). Otherwise they are no replicas. {REMEDIES}"
        )
    return (
        f"the {what} of {shown} differs between ranks that should hold copies of it ({scope.size} ranks are "
        f"in scope).{others} {REMEDIES}"
    )
