"""Kernels from torch's foreach operators, for every device.

All lists hold strided tensors of one device and one dtype, none of them empty or overlapping itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# torch's CPU norm adds float32 squares one after the other into a few float32 lanes: 0.5 % off for 60 M
# elements, and 1e-5 off for a few thousand equal ones. The norms of rows of this length, joined in
# float64, are at most 1e-7 off, at the same speed.
_CPU_ROW = 256
_CPU_SMALL = 512  # up to here the plain norm is as good, and one call serves all tensors


def power_sums(tensors: list[Tensor], norm_type: float, accumulate: torch.dtype) -> Tensor:
    """``Σ|g|^p`` of each tensor, or ``max|g|`` for p = ∞. [len(tensors)] float64, on their device.

    Sums of squares are accumulated in ``accumulate`` (float32, or float64), or in the tensors' own
    dtype where that is wider; other powers in float64, which they need.
    """
    if tensors[0].is_complex():
        tensors = [torch.view_as_real(t) if norm_type == 2 else t.abs() for t in tensors]
    if norm_type != 2 and not math.isinf(norm_type):
        accumulate = torch.float64
    accumulate = torch.promote_types(accumulate, tensors[0].dtype)
    if norm_type == 2 and accumulate == torch.float32 and tensors[0].device.type == "cpu":
        return _cpu_sums_of_squares(tensors)
    norms = torch.stack(torch._foreach_norm(tensors, norm_type, dtype=accumulate)).double()
    if math.isinf(norm_type):
        return norms
    return norms.square() if norm_type == 2 else norms.pow(norm_type)


def _cpu_sums_of_squares(tensors: list[Tensor]) -> Tensor:
    if all(t.numel() <= _CPU_SMALL and t.is_contiguous() for t in tensors):
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square_()
    # Large tensors go by rows, small ones and what is left at the end of the large ones in one call.
    rows: list[Tensor] = []  # [rows of the tensor, _CPU_ROW]
    row_owner: list[int] = []
    rest: list[Tensor] = []
    rest_owner: list[int] = []
    for i, tensor in enumerate(tensors):
        numel = tensor.numel()
        if numel > _CPU_SMALL and not numel % _CPU_ROW and tensor.is_contiguous():
            rows.append(tensor.view(-1, _CPU_ROW))
            row_owner.append(i)
            continue
        flat = _flat(tensor)
        if numel > _CPU_SMALL:
            whole = numel - numel % _CPU_ROW
            rows.append(flat[:whole].view(-1, _CPU_ROW))
            row_owner.append(i)
            flat = flat[whole:]
        if flat.numel():
            rest.append(flat)
            rest_owner.append(i)
    sums = torch.zeros(len(tensors), dtype=torch.float64)
    if rows:
        counts = [r.size(0) for r in rows]
        norms = torch.empty(sum(counts), dtype=torch.float32)
        for row, out in zip(rows, torch.split(norms, counts), strict=True):
            torch.linalg.vector_norm(row, 2, 1, dtype=torch.float32, out=out)
        squares = torch.segment_reduce(norms.double().square_(), "sum", lengths=torch.tensor(counts))
        sums.index_add_(0, torch.tensor(row_owner), squares)
    if rest:
        squares = torch.stack(torch._foreach_norm(rest, 2, dtype=torch.float32)).double().square_()
        sums.index_add_(0, torch.tensor(rest_owner), squares)
    return sums


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in memory order: a view where the tensor is dense, else a copy."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).contiguous().view(-1)


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


def clamp_each_(tensor: Tensor, bound: Tensor, unit: Tensor) -> None:
    """Clamp every element to ``bound`` times its own ``unit`` ≥ 0, in float32; where that is 0, leave it."""
    limit = torch.where(torch.isinf(bound), bound, bound * unit.float())
    large = (limit > 0) & (tensor.abs() > limit)
    tensor.copy_(torch.where(large, (torch.sgn(tensor) * limit).to(tensor.dtype), tensor))


def fill_where_(tensors: Sequence[Tensor], value: float, condition: Tensor) -> None:
    """Fill every tensor with ``value`` where the 0-dim bool ``condition`` is true, else leave it."""
    for t in tensors:
        t.masked_fill_(condition, value)
