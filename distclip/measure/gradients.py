"""The gradients of this step, as plain local tensors that can be measured and changed in place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.layout.memory import MEASURABLE, Region, has_memory, lie_apart, overlapping
from distclip.layout.placement import Placement
from distclip.measure.reduction import as_dtensor, is_summed, settle_gradients, wait
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import LOCAL_TENSOR, SPEC
from distclip.torch_private.operators import FakeTensor
from distclip.torch_private.tensors import overlaps_itself, sparse_indices, sparse_values


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
        rows: of sparse ones, by parameter, the row of the parameter that each of their values belongs to,
            [values] int64; their values are in the buckets.
        rebuilt: gradients that could not be (sparse, expanded, lazily conjugated or negated, still in
            flight): their stand-in is in the buckets, and becomes ``.grad`` only if it is changed.
    """

    parameters: list[Tensor]
    buckets: list[Bucket]
    rebuilt: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, new .grad)
    rows: dict[int, Tensor] = field(default_factory=dict)

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
    collecting = _Collecting(plan, parameters)
    for i, parameter in enumerate(parameters):
        if parameter.grad is not None:
            collecting.add(i, parameter.grad)
    if not torch.compiler.is_compiling():
        collecting.require_apart()
    return Gradients(parameters, list(collecting.buckets.values()), collecting.rebuilt, collecting.rows)


class _Collecting:
    """Gradients that share all their memory (tied ones, say) are one, which is counted and scaled once. What
    is not worked on where it lies has memory of its own."""

    def __init__(self, plan: Plan, parameters: Sequence[Tensor]) -> None:
        self.buckets: dict[tuple[torch.device, torch.dtype], Bucket] = {}
        self.rebuilt: list[tuple[Tensor, Tensor]] = []
        self.rows: dict[int, Tensor] = {}
        self._plan, self._parameters = plan, parameters
        self._seen: dict[Hashable, Tensor | None] = {}  # by identity, what .grad would have to become
        # What is worked on where it lies.
        self._regions: list[Region] = []
        self._owners: list[int] = []

    def add(self, i: int, gradient: Tensor) -> None:
        parameter, name = self._parameters[i], self._plan.parameters[i].name
        local = getattr(gradient, LOCAL_TENSOR) if isinstance(gradient, DTensor) else gradient
        arrived = local if type(local) is Tensor else _bare(local, name)
        _require_measurable(arrived, gradient, self._plan.placements[i], name)
        if arrived.numel() == 0:
            return
        identity: Hashable
        if torch.compiler.is_compiling():  # addresses and lazy flags are unknown to the tracer
            workable, identity = _traced(arrived), i
        elif arrived.layout is torch.sparse_coo:
            workable, identity = self._of_sparse(i, arrived)
        else:
            workable, identity = self._of_strided(arrived, gradient)
        if identity in self._seen:
            replacement = self._seen[identity]
        else:
            replacement = None if workable is local else _like(workable, parameter)
            elements = workable
            if workable.layout is torch.sparse_coo:
                elements, self.rows[i] = sparse_values(workable), sparse_indices(workable)[0]
            if elements.numel() == 0:
                return
            self._seen[identity] = replacement
            bucket = self.buckets.setdefault((elements.device, elements.dtype), Bucket())
            bucket.tensors.append(elements)
            bucket.parameters.append(i)
            if isinstance(identity, Region):
                self._regions.append(identity)
                self._owners.append(i)
        if replacement is not None:
            self.rebuilt.append((parameter, replacement))

    def _of_strided(self, local: Tensor, gradient: Tensor) -> tuple[Tensor, Hashable]:
        """What is worked on, and what tells whether it has been seen: a region, if that is its memory."""
        region = Region.of(local)
        if local.is_conj() or local.is_neg():
            return local.resolve_conj().resolve_neg(), (region, local.is_conj(), local.is_neg())
        if region.repeats:  # expanded, say
            return local.contiguous(), id(gradient)
        return local, region

    def _of_sparse(self, i: int, local: Tensor) -> tuple[Tensor, Hashable]:
        values, indices = sparse_values(local), sparse_indices(local)
        if not values.numel():
            return local, id(local)
        if not local.sparse_dim():
            return local.to_dense(), id(local)
        region = Region.of(values)
        identity = (region, Region.of(indices), local.is_coalesced())
        if not local.is_coalesced():
            return local.coalesce(), identity
        if identity in self._seen:
            return local, identity
        lazy = values.is_conj() or values.is_neg()
        if lazy or region.repeats or any(map(region.shares, self._regions)):
            values = values.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            return _sparse_like(local, values), identity
        self._regions.append(region)
        self._owners.append(i)
        return local, identity

    def require_apart(self) -> None:
        """
        Raises:
            ValueError: two gradients share a part of their memory, which would be scaled twice.
        """
        regions = self._regions
        begins = [region.begin for region in regions]
        if lie_apart(begins, [region.end - region.begin for region in regions]):
            return
        if (pair := overlapping(regions)) is not None:
            names = [self._plan.parameters[self._owners[k]].name for k in pair]
            raise ValueError(
                f"the gradients of {names[0]} and {names[1]} share a part of their memory, which would be "
                "counted and scaled twice: give each its own before the clip, parameter.grad = "
                "parameter.grad.clone()"
            )


def _unsettled(plan: Plan, parameters: Sequence[Tensor]) -> bool:
    if any(parameters[i].grad is None for i in plan.partial):
        return True
    for parameter, placement in zip(parameters, plan.placements, strict=True):
        if placement.partial:
            if not is_summed(parameter):
                return True
        elif placement.mesh is not None:
            gradient = parameter.grad
            if (
                isinstance(gradient, DTensor)
                and getattr(gradient, SPEC).placements != placement.torch_placements
            ):
                return True
    return False


def _bare(local: Tensor, name: str) -> Tensor:
    """A gradient of a class of its own as the plain tensor that it is: one in flight, once it has arrived.

    Raises:
        ValueError: it is none, but answers operators with something else.
    """
    arrived = wait(local)
    if type(arrived) is Tensor or torch.compiler.is_compiling() or isinstance(arrived, FakeTensor):
        return arrived
    if has_memory(type(arrived)):
        return arrived.as_subclass(Tensor)  # the same memory
    raise ValueError(
        f"the gradient of {name} is a {type(local).__name__}, a subclass of Tensor that has no memory of its "
        "own, so what its elements are is known to its operators alone: make it a plain tensor before the "
        "clip, parameter.grad = parameter.grad.dequantize() or what it has in place of that, or leave the "
        "parameter out"
    )


def _require_measurable(local: Tensor, gradient: Tensor, placement: Placement, name: str) -> None:
    """
    Raises:
        ValueError: its elements cannot be summed and scaled, or are not those that the parameter has here.
    """
    nested = local.is_nested
    if nested or (local.layout is not torch.strided and local.layout is not torch.sparse_coo):
        layout = "a nested tensor" if nested else f"of layout {local.layout}"
        raise ValueError(
            f"the gradient of {name} is {layout}: those of layout torch.strided and torch.sparse_coo can be "
            "clipped. Make it one of these before the clip, parameter.grad = parameter.grad.to_dense() say"
        )
    if local.dtype not in MEASURABLE:
        raise ValueError(
            f"the gradient of {name} is of dtype {local.dtype}, in which nothing can be summed or scaled: "
            "clip the gradients of the parameters that the optimizer steps, in bfloat16 or wider, or make it "
            "one of those before the clip"
        )
    if local.is_meta:
        raise ValueError(
            f"the gradient of {name} is on the meta device, which holds no values: run backward on a model "
            "that has been brought to a device, model.to_empty(device=...)"
        )
    if isinstance(gradient, DTensor):
        if placement.mesh is None and not all(p.is_replicate() for p in gradient.placements):
            raise ValueError(
                f"the gradient of {name} is a DTensor ({gradient.placements}) and the parameter is a plain "
                "tensor, so it is not known what of it this rank holds: make the parameter a DTensor too, or "
                "parameter.grad = parameter.grad.full_tensor()"
            )
    elif placement.mesh is not None:
        raise ValueError(
            f"{name} is a DTensor ({placement.label}) and its gradient is a plain tensor, so it is not known "
            "what of it this rank holds: parameter.grad = distribute_tensor(gradient, parameter.device_mesh, "
            "parameter.placements)"
        )


def _sparse_like(sparse: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        sparse_indices(sparse),
        values,
        sparse.shape,
        dtype=values.dtype,
        device=values.device,
        is_coalesced=True,
        check_invariants=False,
    )


def _traced(local: Tensor) -> Tensor:
    if local.layout is torch.sparse_coo:
        return local.coalesce()
    if local.is_contiguous():
        return local
    resolved = local.resolve_conj().resolve_neg()
    return resolved.contiguous() if overlaps_itself(resolved) else resolved


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """What ``.grad`` becomes, from what this rank holds of it."""
    if isinstance(parameter, DTensor):
        return as_dtensor(local, parameter, tuple(parameter.placements))
    return local
