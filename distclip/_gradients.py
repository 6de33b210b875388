"""The gradients of this step, as plain local tensors that can be measured and changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip._plan import Plan
from distclip._reduction import as_dtensor, is_summed, settle_gradients, wait


@dataclass(eq=False)
class Bucket:
    """Local gradients of one device and dtype, and the parameter that each belongs to."""

    tensors: list[Tensor] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Gradients:
    """What this rank holds of the gradient, each element once.

    Attributes:
        parameters: the plan's.
        buckets: strided, non-empty tensors that can be changed in place.
        rebuilt: gradients that could not be (sparse, expanded, lazily conjugated or negated, still in
            flight): their stand-in is in the buckets, and becomes ``.grad`` only if it is changed.
    """

    parameters: list[Tensor]
    buckets: list[Bucket]
    rebuilt: list[tuple[Tensor, Tensor]]  # (parameter, new .grad)

    def commit(self) -> None:
        """The tensors in the buckets have been changed: make that the gradients' value."""
        for parameter, gradient in self.rebuilt:
            parameter.grad = gradient


def collect(plan: Plan, tensors: Sequence[Tensor]) -> Gradients:
    """The gradients as they are now. May sum ``Partial`` ones first, with every rank of their mesh.

    ``tensors``: the list that the plan was made for.
    """
    parameters = [tensors[i] for i in plan.positions]
    if _unsettled(plan, parameters):
        settle_gradients(plan, parameters)
    buckets: dict[tuple[torch.device, torch.dtype], Bucket] = {}
    rebuilt: list[tuple[Tensor, Tensor]] = []
    seen: dict[tuple[int, int], Tensor | None] = {}  # by memory, what .grad would have to become
    compiling = torch.compiler.is_compiling()
    for i, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
        strided = local.layout is torch.strided and type(local) is Tensor
        # Tied or aliased gradients are one gradient: count and scale it once.
        if compiling:  # addresses and lazy flags are unknown to the tracer
            memory = (i, 0)
            lazy = False
        else:
            memory = ((local if strided else _values(local)).data_ptr(), local.numel())
            lazy = local.is_conj() or local.is_neg()
        if memory in seen:
            replacement = seen[memory]
        else:
            replacement = None
            if not strided or not local.is_contiguous() or lazy:
                local, replacement = _workable(local, parameter)
            if local.numel() == 0:
                continue
            seen[memory] = replacement
            bucket = buckets.setdefault((local.device, local.dtype), Bucket())
            bucket.tensors.append(local)
            bucket.parameters.append(i)
        if replacement is not None:
            rebuilt.append((parameter, replacement))
    return Gradients(parameters, list(buckets.values()), rebuilt)


def _unsettled(plan: Plan, parameters: Sequence[Tensor]) -> bool:
    if any(parameters[i].grad is None for i in plan.partial):
        return True
    for parameter, placement in zip(parameters, plan.placements, strict=True):
        if placement.partial:
            if not is_summed(parameter):
                return True
        elif placement.mesh is not None:
            gradient: Any = parameter.grad
            if gradient is not None and gradient._spec.placements != placement.torch_placements:
                return True
    return False


def _values(local: Tensor) -> Tensor:
    """The tensor that holds the elements of a gradient that is not simply strided."""
    if local.layout is torch.sparse_coo:
        return local._values()
    arrived = wait(local)
    if arrived.layout is not torch.strided:
        raise ValueError(
            f"a gradient of shape {tuple(local.shape)} has layout {local.layout}: strided and sparse_coo "
            "gradients can be clipped"
        )
    return arrived


def _workable(local: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """A strided tensor to work on in place, and what ``.grad`` has to become if that is done."""
    if local.layout is torch.sparse_coo:
        coalesced = local.coalesce()
        return coalesced._values(), coalesced
    arrived = wait(local).resolve_conj().resolve_neg()
    if torch._debug_has_internal_overlap(arrived) == 1:  # expanded: several elements share memory
        arrived = arrived.contiguous()
    if arrived is local:
        return local, None
    if isinstance(parameter, DTensor):
        return arrived, as_dtensor(arrived, parameter, tuple(parameter.placements))
    return arrived, arrived
