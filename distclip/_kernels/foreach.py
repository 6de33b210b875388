"""Kernels from torch's foreach operators, for every device.

All lists hold strided tensors of one device and one dtype, none of them empty or overlapping itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

# torch's CPU norm adds float32 squares one after the other into a few float32 lanes: 0.5 % off for 60 M
# elements, and 1e-5 off for a few thousand equal ones. The norms of rows of this length, joined in
# float64, are mostly 1e-7 off, and 6e-7 for equal elements at worst, at nearly the same speed.
_CPU_ROW = 512
# One that divides the tensor leaves nothing over; a multiple of the vector length is quicker, and a long one.
_ROW_LENGTHS = sorted(range(257, 513), key=lambda n: (n % 16 > 0, -n))
_PIECE = 1 << 20  # elements: 4 MB
_KEPT = 1 << 28  # elements: 4 MB for the norms of their rows
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
    numels = tuple([t.numel() for t in tensors])
    if max(numels) <= _CPU_SMALL:
        return _squared_norms(tensors)
    if torch.compiler.is_compiling() or sum(numels) > _KEPT:
        rows = _cut(numels)
    else:  # the memory that rows are measured into is kept, for each thread its own
        rows = _rows_of(numels, get_ident())
    tensors = [t if t.is_contiguous() else _flat(t) for t in tensors]
    for i, shape, out in rows.large:
        _row_norms(tensors[i].as_strided(shape, (shape[1], 1)), out)
    squares = rows.norms.double().square_()
    sums = torch.segment_reduce(squares, "sum", lengths=rows.lengths)
    if rows.rest:
        rest = [tensors[i] if not begin else tensors[i].view(-1)[begin:] for i, begin in rows.rest]
        sums.index_add_(0, rows.owner_of_rest, _squared_norms(rest))
    return sums


def _squared_norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square_()


def _row_norms(rows: Tensor, out: Tensor) -> None:
    """The norm of each row, into ``out`` [num_rows] float32."""
    if rows.dtype == torch.float32:
        torch.linalg.vector_norm(rows, 2, 1, out=out)
        return
    # torch's norm that reads 16 bits and adds in float32 is not vectorised: converting piece by piece, within
    # the cache, takes a third of its time.
    count = max(1, _PIECE // rows.size(1))
    for part, norms in zip(torch.split(rows, count), torch.split(out, count), strict=True):
        torch.linalg.vector_norm(part.float(), 2, 1, out=norms)


@dataclass(frozen=True, eq=False)
class _Rows:
    """How tensors of certain sizes are cut into rows, and the memory for the norms of these.

    Attributes:
        large: of each tensor that has rows: its position, [rows, length of a row], and its part of ``norms``.
        rest: of each tensor with elements outside of them: its position, and where these begin.
        lengths: rows of each tensor.                                          # [num_tensors] int64
    """

    large: list[tuple[int, tuple[int, int], Tensor]]
    norms: Tensor  # [rows of all tensors] float32
    lengths: Tensor
    rest: list[tuple[int, int]]
    owner_of_rest: Tensor  # [len(rest)] int64


@lru_cache(maxsize=16)
def _rows_of(numels: tuple[int, ...], thread: int) -> _Rows:
    return _cut(numels)


def _cut(numels: tuple[int, ...]) -> _Rows:
    length_of = {numel: _row_length(numel) for numel in set(numels)}
    shapes: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for i, numel in enumerate(numels):
        length = length_of[numel]
        count = numel // length if numel > _CPU_SMALL else 0
        shapes.append((count, length))
        if count * length < numel:
            rest.append((i, count * length))
    counts = [count for count, _ in shapes]
    norms = torch.empty(sum(counts))
    parts = torch.split(norms, counts) if counts else ()
    return _Rows(
        [(i, shape, parts[i]) for i, shape in enumerate(shapes) if shape[0]],
        norms,
        torch.tensor(counts),
        rest,
        torch.tensor([i for i, _ in rest], dtype=torch.int64),
    )


def _row_length(numel: int) -> int:
    return next((n for n in _ROW_LENGTHS if numel % n == 0), _CPU_ROW) if numel > _CPU_SMALL else _CPU_ROW


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in memory order: a view where the tensor is dense, else a copy."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).contiguous().view(-1)


def scale_(tensors: list[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor by one 0-dim float32 coefficient (computed in float32, rounded once)."""
    if _narrow_on_cuda(tensors[0]):
        _multiply(tensors, [coefficient] * len(tensors))
    else:
        torch._foreach_mul_(tensors, coefficient)


def scale_each_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply each tensor by its own coefficient, [len(tensors)] float32."""
    if _narrow_on_cuda(tensors[0]):
        _multiply(tensors, coefficients.unbind())
    else:
        torch._foreach_mul_(tensors, coefficients.unbind())


def _narrow_on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor.element_size() < 4


def _multiply(tensors: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
    """CUDA rounds a 0-dim coefficient to the tensor's dtype before it multiplies. One of one dimension it
    leaves float32, and so the product, until it is stored."""
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        tensor.mul_(coefficient.view(1) if tensor.dim() else coefficient)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """Clamp every element to ``[-bound, bound]``; complex ones to that magnitude. NaN stays NaN."""
    if tensors[0].is_complex():
        for t in tensors:
            magnitude = t.abs()
            t.mul_(torch.where(magnitude > bound, bound / magnitude, 1.0))
        return
    high = bound.to(tensors[0].dtype)
    low = -high
    for t in tensors:
        t.clamp_(low, high)


def clamp_each_(tensor: Tensor, bound: Tensor, unit: Tensor) -> None:
    """Clamp every element to ``bound`` times its own ``unit`` ≥ 0, in float32; where that is 0, leave it."""
    limit = torch.where(torch.isinf(bound), bound, bound * unit.float())
    large = (limit > 0) & (tensor.abs() > limit)
    tensor.copy_(torch.where(large, (torch.sgn(tensor) * limit).to(tensor.dtype), tensor))


def fill_where_(tensors: Sequence[Tensor], value: float, condition: Tensor) -> None:
    """Fill every tensor with ``value`` where the 0-dim bool ``condition`` is true, else leave it."""
    for t in tensors:
        t.masked_fill_(condition, value)
