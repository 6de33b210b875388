"""One parameter whose gradient is looked at by itself, as backward brings it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip import kernels
from distclip.decide.norms import LARGEST, PLAIN
from distclip.layout.parameters import NamedParameter
from distclip.layout.placement import MANAGED
from distclip.layout.scope import message_device
from distclip.measure.gradients import Gradients, collect
from distclip.measure.reduction import is_offloaded, reduce_message
from distclip.planning.plan import build_plan
from distclip.strategies._base import scale_to


class Single:
    """How one parameter lies over the ranks, for hooks that see it alone. Holds no tensor.

    Making it does not communicate: what a plain tensor does not say of other ranks is not found out.

    Raises:
        ValueError: its gradient is not complete, or not there, when a hook of the parameter runs.
    """

    def __init__(self, parameter: NamedParameter) -> None:
        name = parameter.name
        if hasattr(parameter.tensor, MANAGED):
            raise ValueError(
                f"{name} is managed by FSDP1, which computes the gradient of its flat parameter and runs no "
                "hook of this one: use distclip.Clipper after backward, or FSDP2 (fully_shard)"
            )
        self._plan = build_plan([parameter], alone=True)
        placement = self._plan.placements[0]
        if placement.partial or placement.tied:
            raise ValueError(
                f"{name} is {placement.label}: its gradient is complete only after a sum that follows "
                "backward, so a hook cannot clip it. Use distclip.Clipper after backward."
            )
        self.name = name
        self.shards = placement.shards

    def collect(self, parameter: Tensor) -> Gradients:
        """What this rank holds of ``parameter.grad``. Sums it first where it is a ``Partial`` DTensor."""
        if parameter.grad is not None and is_offloaded(parameter.grad):
            # FSDP2 may have begun to copy it from this stream and not have waited (torch 2.11).
            torch.accelerator.current_stream().synchronize()
        return collect(self._plan, [parameter])

    def power_sums(self, gradients: Gradients, norm_type: float) -> Tensor:
        """This rank's ``Σ|g|^p`` (``max|g|`` for p = ∞), and beside it of a float64 gradient
        ``Σ(|g|/2^distance)^p``: [1] or [2] float64; 0 for an empty shard."""
        distance = kernels.distance(norm_type) if self._plan.wide else 0
        for bucket in gradients.buckets:  # one at most
            return sums_of(bucket.tensors, norm_type, distance)[:, 0]
        return torch.zeros(2 if distance else 1, dtype=torch.float64, device=self._plan.device)

    def norm(self, power_sums: Tensor, norm_type: float) -> Tensor:
        """The norm of the whole gradient, [] float64, the same on every rank that holds a part of it.

        One all-reduce of these numbers for each axis that the parameter is sharded over.
        """
        whole = power_sums.clone()
        for axis in self.shards:
            whole = whole.to(message_device(axis.group, [whole]))
            whole = reduce_message(whole, norm_type, axis.group_name)
        return norm_from(whole.to(power_sums.device), norm_type)


def sums_of(tensors: list[Tensor], norm_type: float, distance: int) -> Tensor:
    """``Σ|g|^p`` of each and, with a distance, ``Σ(|g|/2^distance)^p``: [1 or 2, len(tensors)] float64."""
    sums = kernels.power_sums(tensors, norm_type, torch.float32)
    return torch.stack([sums, kernels.far_power_sums(tensors, norm_type, sums)] if distance else [sums])


def norm_from(sums: Tensor, norm_type: float) -> Tensor:
    """The norms, float64, from [1 or 2, ...] as above."""
    if math.isinf(norm_type):
        return sums[0]
    norms = sums[0].pow(1.0 / norm_type)
    if len(sums) == 1:
        return norms
    far = sums[1].pow(1.0 / norm_type) * 2.0 ** kernels.distance(norm_type)
    return torch.where(torch.isinf(sums[0]), far, norms)


def coefficient_to(norm: Tensor, max_norm: float | Tensor, eps: float) -> Tensor:
    """``min(1, max_norm / (norm + eps))`` from norms in float64, [] or [k]: as strategies have it, in
    float32; in float64 where the norms may be so large that float32 does not hold them or it."""
    usual = scale_to(norm.float(), max_norm, eps)
    largest = kernels.look(norm.amax())
    if largest is not None and largest[0] <= PLAIN:
        return usual
    exact = scale_to(norm, max_norm, eps)
    beyond = (norm > LARGEST) | (exact < torch.finfo(torch.float32).tiny)
    return torch.where(beyond, exact, usual.double())
