"""One parameter whose gradient is looked at by itself, as backward brings it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip import _kernels as kernels
from distclip._gradients import Gradients, collect
from distclip._norms import LARGEST, PLAIN
from distclip._parameters import NamedParameter
from distclip._placement import MANAGED
from distclip._plan import build_plan
from distclip._reduction import is_offloaded, reduce_message
from distclip._scope import message_device
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

    def power_sum(self, gradients: Gradients, norm_type: float) -> Tensor:
        """This rank's ``Σ|g|^p`` (``max|g|`` for p = ∞), [1] float64; 0 for an empty shard."""
        for bucket in gradients.buckets:  # one at most
            return kernels.power_sums(bucket.tensors, norm_type, torch.float32)
        return torch.zeros(1, dtype=torch.float64, device=self._plan.device)

    def norm(self, power_sum: Tensor, norm_type: float) -> Tensor:
        """The norm of the whole gradient, [] float64, the same on every rank that holds a part of it.

        One all-reduce of one number for each axis that the parameter is sharded over.
        """
        whole = power_sum.clone()
        for axis in self.shards:
            whole = whole.to(message_device(axis.group, [whole]))
            whole = reduce_message(whole, norm_type, axis.group_name)
        whole = whole.to(power_sum.device)[0]
        return whole if math.isinf(norm_type) else whole.pow(1.0 / norm_type)


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
