"""The reduced norms of one step: what a strategy sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distclip import kernels

LARGEST: float = torch.finfo(torch.float32).max
# Norms up to here need no float64: float32 holds them, and the coefficient that brings them to any threshold
# that is no joke.
PLAIN = 2.0**64


def combine(norms: Tensor, norm_type: float) -> Tensor:
    """The norm of the whole from the norms of its disjoint parts: ``(Σ nᵢ^p)^(1/p)``, max for p = ∞.

    ``norms``: [k], any float dtype. Returns a 0-dim tensor of that dtype, computed in float64.
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    if math.isinf(norm_type):
        return norms.amax()
    whole: Tensor = torch.linalg.vector_norm(norms.double(), norm_type)
    return whole.to(norms.dtype)


def regroup(power_sums: Tensor, index: Tensor, num_groups: int, norm_type: float) -> Tensor:
    """``Σ|g|^p`` (``max|g|`` for p = ∞) of parts -> of the groups that they belong to, [num_groups].

    ``power_sums``: [k] float64; ``index``: [k] int64, the group of each. Adds in the same order every time,
    as CUDA's ``index_add_`` does not: ranks with the same parts get the same bits.
    """
    groups = power_sums.new_zeros(num_groups)
    if math.isinf(norm_type):
        return groups.scatter_reduce_(0, index, power_sums, "amax")
    if num_groups == 1:
        return power_sums.sum(0, keepdim=True)
    return groups.index_put_((index,), power_sums, accumulate=True)


def grouped(norms: Tensor, index: Tensor, num_groups: int, norm_type: float) -> Tensor:
    """Norms of parts, [k] -> of the groups that they belong to, float32; ``index``: [k] int64."""
    if math.isinf(norm_type):
        return regroup(norms.double(), index, num_groups, norm_type).float()
    return regroup(norms.double().pow(norm_type), index, num_groups, norm_type).pow(1 / norm_type).float()


@dataclass(frozen=True)
class Exact:
    """Norms as float64 has them: ``total`` [], ``slots`` [num_slots]."""

    total: Tensor
    slots: Tensor

    def times(self, factor: Tensor) -> Exact:
        return Exact(self.total * factor, self.slots * factor)


@dataclass(frozen=True)
class Norms:
    """Gradient norms of one step, before clipping, the same numbers on every rank.

    A finite norm that float32 does not hold is its largest number here: ``total`` and ``slots`` are finite
    exactly where the norms are. (What that has cut off, the coefficients make up for, see ``apply.change``.)

    Attributes:
        total: [] float32, the norm of the whole gradient.
        slots: [num_slots] float32, the norm of each slot (of each parameter where the strategy's
            ``per_parameter`` is true, else of each of its ``groups``).
        exact: both in float64, where they are large or the host has not looked; else None.
        norm_type: p of the norms.
        weights: [num_slots] float32, the norms of the parameters themselves, for a ``per_unit`` strategy.
        clamped: for a strategy that ``measures_again``: from coefficients, [] or [num_slots] float64, and a
            bound, [] float32, to [2] float64, ``Σ min(|c·g|, bound)^p`` of the whole gradient and how many
            elements were above the bound. Takes a collective, which all ranks in scope join or none.
        extra: [num_extra] float64, the sums of what a strategy's ``elementwise`` returned.
        loss: [] float32, the mean over the ranks that gave one, for a strategy that ``uses_loss``.
    """

    total: Tensor
    slots: Tensor
    norm_type: float = 2.0
    labels: tuple[str, ...] = field(default=("total",), repr=False)  # [num_slots], not of units
    weights: Tensor | None = None
    extra: Tensor | None = None
    loss: Tensor | None = None
    exact: Exact | None = field(default=None, repr=False)
    clamped: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def exact_total(self) -> Tensor:
        """[] float64."""
        return self.total.double() if self.exact is None else self.exact.total

    @property
    def reported_total(self) -> Tensor:
        """[] float32, ∞ where that does not hold the norm."""
        return self.total if self.exact is None else self.exact.total.float()

    @property
    def reported_slots(self) -> Tensor:
        """[num_slots] float32, likewise."""
        return self.slots if self.exact is None else self.exact.slots.float()

    def times(self, factor: Tensor) -> Norms:
        """The norms of the gradient multiplied by a factor ≥ 0, [] float32."""
        total, slots, exact = self.total * factor, self.slots * factor, self.exact
        if exact is not None:
            scaled = exact.times(factor)
            total = torch.where(exact.total > LARGEST, _held(scaled.total), total)
            slots = torch.where(exact.slots > LARGEST, _held(scaled.slots), slots)
            exact = scaled
        return replace(self, total=total, slots=slots, exact=exact)

    @staticmethod
    def from_power_sums(
        sums: Tensor,
        norm_type: float,
        labels: tuple[str, ...],
        far: Tensor | None = None,
        distance: int = 0,
    ) -> Norms:
        """From reduced ``Σ|g|^p`` (``max|g|`` for p = ∞), [num_slots] float64. ``far``:
        ``Σ(|g|/2^distance)^p``, for where the sums themselves leave float64."""
        if math.isinf(norm_type):
            slots = sums
            total = sums.amax() if sums.numel() else sums.new_zeros(())
        else:
            whole = sums[0] if sums.numel() == 1 else sums.sum()
            slots = sums.pow(1.0 / norm_type)
            total = slots[0] if sums.numel() == 1 else whole.pow(1.0 / norm_type)
            if far is not None:
                far_slots = far.pow(1.0 / norm_type) * 2.0**distance
                far_total = far.sum().pow(1.0 / norm_type) * 2.0**distance
                slots = torch.where(torch.isinf(sums), far_slots, slots)
                total = torch.where(torch.isinf(whole), far_total, total)
        seen = kernels.look(total)
        if seen is not None and seen[0] <= PLAIN:
            return Norms(total.float(), slots.float(), norm_type, labels)
        return Norms(_held(total), _held(slots), norm_type, labels, exact=Exact(total, slots))


def _held(norms: Tensor) -> Tensor:
    """float64 -> float32: what is finite stays so."""
    return torch.where(norms < math.inf, norms.clamp(max=LARGEST), norms).float()
