"""The collectives of a step. No other module that runs every step talks to other ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip._plan import Plan


def reduce_message(message: Tensor, norm_type: float, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's contributions, [num_slots] float64, joined in place: a sum, or for p = ∞ a maximum."""
    if math.isinf(norm_type):
        # A maximum may lose a NaN on the way; an infinity is as good a witness.
        message.nan_to_num_(nan=math.inf, posinf=math.inf)
    if group is not None:
        dist.all_reduce(
            message, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=group
        )
    return message


def settle_gradients(plan: Plan, parameters: Sequence[Tensor]) -> None:
    """Bring DTensor gradients that lie otherwise than their parameters into the parameters' placement.

    ``Partial`` gradients of replicated parameters (sequence parallelism) are summed, all of one mesh axis
    and dtype in a single all-reduce, and written back as replicated. A rank whose gradient is missing
    joins with zeros and receives the sum. (Invariant: the ranks of a mesh that have a gradient have it in
    the same placement, as DTensor's backward pass leaves it.)
    """
    flights: dict[tuple[int, int, str, torch.dtype], list[_PartialGradient]] = {}
    for i, (parameter, placement) in enumerate(zip(parameters, plan.placements, strict=True)):
        gradient = parameter.grad
        reductions: tuple[str, ...] = ()
        if gradient is None:
            reductions = plan.partial.get(i, ())
        elif isinstance(gradient, DTensor) and gradient.placements != placement.torch_placements:
            reductions = _pending_reductions(gradient.placements, placement.torch_placements)
            if not reductions:
                parameter.grad = gradient.redistribute(placement.mesh, placement.torch_placements)
        if any(reductions):
            partial = _PartialGradient.of(parameter, placement.torch_placements)
            for axis, reduction in enumerate(reductions):
                if reduction:
                    flight = (id(placement.mesh), axis, reduction, partial.local.dtype)
                    flights.setdefault(flight, []).append(partial)
    for (_, axis, reduction, _), members in flights.items():
        _sum(members, members[0].parameter.device_mesh, axis, reduction)
    for partial in {id(p): p for members in flights.values() for p in members}.values():
        partial.write_back()


def _pending_reductions(found: Sequence[Any], wanted: Sequence[Any]) -> tuple[str, ...]:
    """The reduction per axis that turns ``found`` into ``wanted``; () where it takes more than a sum."""
    if all(f == w or (f.is_partial() and w.is_replicate()) for f, w in zip(found, wanted, strict=True)):
        return tuple(f.reduce_op if f.is_partial() else "" for f in found)
    return ()


@dataclass(eq=False)
class _PartialGradient:
    parameter: DTensor
    placements: tuple[Any, ...]  # to be written back with
    local: Tensor
    holders: Tensor  # [1]: of the ranks summed so far, how many had a gradient

    @staticmethod
    def of(parameter: Tensor, placements: tuple[Any, ...]) -> _PartialGradient:
        assert isinstance(parameter, DTensor)
        gradient = parameter.grad
        if gradient is None:
            local = torch.zeros_like(parameter._local_tensor)
        else:
            assert isinstance(gradient, DTensor)
            local = wait(gradient._local_tensor)
        return _PartialGradient(parameter, placements, local, local.new_full((1,), gradient is not None))

    def write_back(self) -> None:
        # Only a rank that had none has to look whether any other had (the one host sync of this path).
        if self.parameter.grad is None and not self.holders.item():
            return
        self.parameter.grad = as_dtensor(self.local, self.parameter, self.placements)


def _sum(members: Sequence[_PartialGradient], mesh: DeviceMesh, axis: int, reduction: str) -> None:
    flat = torch.cat([t.flatten() for m in members for t in (m.local, m.holders)])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=mesh.get_group(axis))
    if reduction == "avg":
        flat.div_(mesh.size(axis))
    parts = iter(torch.split(flat, [n for m in members for n in (m.local.numel(), 1)]))
    for member in members:
        member.local = next(parts).view(member.local.shape)
        member.holders = next(parts)


def as_dtensor(local: Tensor, like: Tensor, placements: Sequence[Any]) -> DTensor:
    """``local`` as this rank's piece of a DTensor of the shape of ``like``."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def wait(local: Tensor) -> Tensor:
    """``local``, after the collective that may still be filling it."""
    return local.wait() if hasattr(local, "wait") else local
