"""Is what the plan counts what is there? Gathers real gradients, one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import OwnershipError
from distclip.layout.placement import Placement
from distclip.measure.reduction import wait
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_of


@dataclass(frozen=True)
class _Piece:
    """What one rank holds of one gradient, and where its plan believes that to stand."""

    rank: int
    stage: int
    name: str
    axes: tuple[str, ...]  # along which the plan believes ranks to hold different elements
    cell: tuple[int, ...]  # this rank's coordinates along them
    certain: bool  # by DTensor or FSDP1, not by declaration
    share: float  # what its elements count, 1 / multiplicity
    copies: int  # stages that hold a tied copy
    elements: Tensor | None  # [k] float64; None where the gradient is missing


def verify_counting(plan: Plan, tensors: Sequence[Tensor]) -> float:
    """The 2-norm of the gathered gradient, after checking that the plan counts each element of it once.

    Every rank in scope calls it, or none. Moves every gradient to every rank, one parameter at a time, in
    float64: a tool for debugging, not for every step. ``Partial`` gradients have been summed before.

    Raises:
        OwnershipError: on every rank: the parameters that are counted more or less than once.
    """
    group = plan.scope.group()
    reduced = {dist.get_rank()} if group is not None else {0}
    if plan.group is not None:
        reduced = set(dist.get_process_group_ranks(plan.group))
    axes = {(a.name, a.ranks) for p in plan.placements for a in (*p.shards, *p.partial)}
    if plan.scope.stages is not None:
        axes.add((plan.scope.stages.name, plan.scope.stages.ranks))
    known_axes = sorted(set().union(*_exchange(axes, group)))
    count = max(_exchange(len(plan.positions), group))

    faults: list[str] = []
    dense = counted = 0.0
    for i in range(count):
        pieces = [p for p in _exchange(_piece(plan, tensors, i), group) if p is not None]
        for stage in sorted({piece.stage for piece in pieces}):
            here = [p for p in pieces if p.stage == stage]
            faults += _faults(here, known_axes)
            cells = {p.cell: _square(p) / p.copies for p in reversed(here) if p.elements is not None}
            dense += sum(cells.values())
        counted += sum(_square(p) * p.share for p in pieces if p.rank in reduced)
    # Every rank must come to the same verdict, though each has seen only its own group's count.
    for other in _exchange((faults, counted), group):
        faults += [fault for fault in other[0] if fault not in faults]
        if not other[0] and not math.isclose(other[1], dense, rel_tol=1e-6, abs_tol=1e-30):
            fault = f"the total: counted {math.sqrt(other[1]):.6g}, gathered {math.sqrt(dense):.6g}"
            faults += [fault] if fault not in faults else []
    if faults:
        raise OwnershipError("the plan miscounts " + ";\n  ".join(faults))
    return math.sqrt(dense)


def _piece(plan: Plan, tensors: Sequence[Tensor], i: int) -> _Piece | None:
    if i >= len(plan.positions):
        return None
    parameter, placement = tensors[plan.positions[i]], plan.placements[i]
    gradient, elements = parameter.grad, None
    if gradient is not None:
        local = wait(local_of(gradient)).detach()
        local = local.to_dense() if local.layout != torch.strided else local
        local = torch.view_as_real(local) if local.is_complex() else local
        elements = local.reshape(-1).double().cpu()
    multiplicity = plan.multiplicities[i] if plan.group is not None else 1
    copies = plan.multiplicities[i] * placement.num_shards * plan.scope.num_stages
    return _Piece(
        rank=plan.scope.ranks[0] if plan.scope.size == 1 else dist.get_rank(),
        stage=plan.scope.stage,
        name=plan.parameters[i].name,
        axes=tuple(axis.name for axis in placement.shards),
        cell=tuple(axis.coordinate for axis in placement.shards),
        certain=_is_certain(placement),
        share=1.0 / multiplicity,
        copies=max(1, copies // (plan.group.size() if plan.group else 1)) if placement.tied else 1,
        elements=elements,
    )


def _is_certain(placement: Placement) -> bool:
    return placement.home is not None and "declared" not in placement.label


def _exchange(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _square(piece: _Piece) -> float:
    return 0.0 if piece.elements is None else piece.elements.square().sum().item()


def _faults(pieces: Sequence[_Piece], known_axes: Sequence[tuple[str, tuple[int, ...]]]) -> list[str]:
    """What is wrong with one parameter of one stage, from the pieces that all its ranks hold."""
    present = [p for p in pieces if p.elements is not None]
    faults: list[str] = []
    first: dict[tuple[int, ...], _Piece] = {}
    for piece in present:
        original = first.setdefault(piece.cell, piece)
        if not faults and not _alike(original, piece):
            along = [name for name, ranks in known_axes if {original.rank, piece.rank} <= set(ranks)]
            faults.append(
                f"{piece.name!r}: under-counted{' along ' + along[0] if along else ''}: ranks "
                f"{original.rank} and {piece.rank} should hold copies and hold different gradients"
            )
    for k, axis in enumerate(pieces[0].axes):
        if any(p.certain for p in present):
            break  # shards of a DTensor may happen to be equal
        lines: dict[tuple[int, ...], list[_Piece]] = {}
        for piece in first.values():
            lines.setdefault(piece.cell[:k] + piece.cell[k + 1 :], []).append(piece)
        if lines and all(len(line) > 1 and _identical(line) for line in lines.values()):
            ranks = sorted(p.rank for p in next(iter(lines.values())))
            faults.append(
                f"{pieces[0].name!r}: over-counted along {axis}: ranks {ranks} should hold different "
                "elements and hold the same gradient"
            )
    return faults


def _alike(a: _Piece, b: _Piece) -> bool:
    """Copies, up to the rounding that replicas may have drifted by."""
    assert a.elements is not None
    assert b.elements is not None
    if a.elements.shape != b.elements.shape:
        return False
    scale = a.elements.abs().max().item() if a.elements.numel() else 0.0
    return torch.allclose(a.elements, b.elements, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)


def _identical(line: Sequence[_Piece]) -> bool:
    elements = [p.elements for p in line if p.elements is not None]
    return bool(elements[0].any()) and all(torch.equal(elements[0], other) for other in elements[1:])
