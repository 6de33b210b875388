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
# A call for each tensor takes longer than to copy one of up to so many elements beside others of its shape.
_SMALL = 1 << 16
_TOGETHER = 1 << 19  # elements: 2 MB, which stay in the cache
_PIECE = 1 << 20  # elements: 4 MB
_KEPT = 1 << 28  # elements: 4 MB for the norms of their rows


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
    if torch.compiler.is_compiling():
        return torch.stack([t.double().square().sum() for t in tensors])  # one pass, once it is compiled
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = list(map(_flat, tensors))
    shapes = tuple([t.shape for t in tensors])
    # The memory that rows are measured into is kept, for each thread its own.
    kept = sum(map(Tensor.numel, tensors)) <= _KEPT
    rows = _rows_of(shapes, get_ident()) if kept else _cut(shapes)
    for block in rows.blocks:
        _measure(block, [tensors[i] for i in block.members])
    squares = rows.norms.double().square_()
    sums = torch.segment_reduce(squares, "sum", lengths=rows.lengths)
    return torch.empty_like(sums).index_copy_(0, rows.order, sums)


def _measure(block: _Block, tensors: list[Tensor]) -> None:
    together = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
    numel, length = block.numel, block.length
    num_rows, rest = divmod(numel, length)
    if num_rows:
        shape, strides = (len(tensors), num_rows, length), (numel, length, 1)
        _norms_into(block.norms[:, :num_rows], together.as_strided(shape, strides))
    if rest:
        shape, strides = (len(tensors), 1, rest), (numel, rest, 1)
        begin = together.storage_offset() + num_rows * length
        _norms_into(block.norms[:, num_rows:], together.as_strided(shape, strides, begin))


def _norms_into(out: Tensor, rows: Tensor) -> None:
    """The norm of each row, [tensors, rows, length] -> [tensors, rows]."""
    if rows.dtype == torch.float32:
        torch.linalg.vector_norm(rows, 2, -1, out=out)
        return
    # torch's norm that reads 16 bits and adds in float32 is not vectorised: converting piece by piece, within
    # the cache, takes a third of its time.
    count = max(1, _PIECE // rows[:, 0].numel())
    for piece, norms in zip(torch.split(rows, count, 1), torch.split(out, count, 1), strict=True):
        torch.linalg.vector_norm(piece.float(), 2, -1, out=norms)


@dataclass(frozen=True, eq=False)
class _Block:
    """Tensors of one shape that are measured together: each in rows of one length, and what is left over.

    Attributes:
        members: their positions.
        numel: elements of each.
        length: of a row.
        norms: what their rows are measured into.                  # [members, rows of each] float32
    """

    members: list[int]
    numel: int
    length: int
    norms: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """How tensors of certain shapes are cut into rows, and the memory for the norms of these.

    Attributes:
        blocks: in these all tensors, each once.
        norms: of the rows of all blocks, in order.                # [rows] float32
        lengths: rows of each tensor, in the order of the blocks.  # [num_tensors] int64
        order: the tensors, in the order of the blocks.            # [num_tensors] int64
    """

    blocks: list[_Block]
    norms: Tensor
    lengths: Tensor
    order: Tensor


@lru_cache(maxsize=16)
def _rows_of(shapes: tuple[torch.Size, ...], thread: int) -> _Rows:
    return _cut(shapes)


def _cut(shapes: tuple[torch.Size, ...]) -> _Rows:
    alike: dict[torch.Size, list[int]] = {}
    for i, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(i)
    parts: list[tuple[list[int], int, int, int]] = []  # members; elements, length of a row, rows of each
    for shape, members in alike.items():
        numel = shape.numel()
        length = _row_length(numel)
        count = max(1, _TOGETHER // numel) if numel <= _SMALL else 1
        for begin in range(0, len(members), count):
            parts.append((members[begin : begin + count], numel, length, -(-numel // length)))
    norms = torch.empty(sum(len(members) * num_rows for members, _, _, num_rows in parts))
    memory = torch.split(norms, [len(members) * num_rows for members, _, _, num_rows in parts])
    return _Rows(
        [
            _Block(members, numel, length, of_rows.view(len(members), num_rows))
            for (members, numel, length, num_rows), of_rows in zip(parts, memory, strict=True)
        ],
        norms,
        torch.tensor([num_rows for members, _, _, num_rows in parts for _ in members]),
        torch.tensor([i for members, *_ in parts for i in members]),
    )


def _row_length(numel: int) -> int:
    if numel <= _CPU_ROW:
        return numel
    return next((n for n in _ROW_LENGTHS if numel % n == 0), _CPU_ROW)


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
