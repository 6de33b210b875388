"""Kernels from torch's foreach operators, for every device.

All lists hold strided tensors of one device and one dtype, none of them empty or overlapping itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# torch's CPU norm adds float32 squares into a few float32 lanes: 0.5 % off for 60 M elements. In pieces
# of this size, joined in float64, the error stays below 2e-7 at the same speed.
_CPU_PIECE = 1 << 16


def power_sums(tensors: Sequence[Tensor], norm_type: float, accumulate: torch.dtype) -> Tensor:
    """``Σ|g|^p`` of each tensor, or ``max|g|`` for p = ∞. [len(tensors)] float64, on their device.

    Sums of squares are accumulated in ``accumulate`` (float32, or float64), or in the tensors' own
    dtype where that is wider; other powers in float64, which they need.
    """
    if tensors[0].is_complex():
        tensors = [torch.view_as_real(t) if norm_type == 2 else t.abs() for t in tensors]
    if norm_type != 2 and not math.isinf(norm_type):
        accumulate = torch.float64
    accumulate = torch.promote_types(accumulate, tensors[0].dtype)
    pieces, owner = list(tensors), None
    if tensors[0].device.type == "cpu" and accumulate == torch.float32 and not math.isinf(norm_type):
        pieces, owner = _in_pieces(tensors)
    norms = torch.stack(torch._foreach_norm(pieces, norm_type, dtype=accumulate)).double()
    if math.isinf(norm_type):
        return norms
    sums = norms.square() if norm_type == 2 else norms.pow(norm_type)
    if owner is None:
        return sums
    return sums.new_zeros(len(tensors)).index_add_(0, torch.tensor(owner), sums)


def _in_pieces(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int] | None]:
    """The tensors cut into pieces of ``_CPU_PIECE``, and the tensor each came from (None: none was cut)."""
    if all(t.numel() <= _CPU_PIECE for t in tensors):
        return list(tensors), None
    pieces: list[Tensor] = []
    owner: list[int] = []
    for i, tensor in enumerate(tensors):
        parts = torch.split(_flat(tensor), _CPU_PIECE) if tensor.numel() > _CPU_PIECE else (tensor,)
        pieces.extend(parts)
        owner.extend([i] * len(parts))
    return pieces, owner


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in memory order: a view where the tensor is dense."""
    order = sorted(range(tensor.dim()), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).reshape(-1)


def scale_(tensors: list[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor by one 0-dim float32 coefficient (computed in float32, rounded once)."""
    torch._foreach_mul_(tensors, coefficient)


def scale_each_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply each tensor by its own coefficient, [len(tensors)] float32."""
    torch._foreach_mul_(tensors, coefficients.unbind())


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """Clamp every element to ``[-bound, bound]``; complex ones to that magnitude. NaN stays NaN."""
    if tensors[0].is_complex():
        for t in tensors:
            magnitude = t.abs()
            t.mul_(torch.where(magnitude > bound, bound / magnitude, 1.0))
        return
    low, high = -bound, bound
    for t in tensors:
        t.clamp_(low.to(t.dtype), high.to(t.dtype))


def fill_where_(tensors: Sequence[Tensor], value: float, condition: Tensor) -> None:
    """Fill every tensor with ``value`` where the 0-dim bool ``condition`` is true, else leave it."""
    for t in tensors:
        t.masked_fill_(condition, value)
