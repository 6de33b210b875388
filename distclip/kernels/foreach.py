"""Kernels from torch's foreach operators, for every device.

All lists hold strided tensors of one device and one dtype, none of them empty or overlapping itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

from distclip.kernels.looking import look, look_at_one
from distclip.torch_private.foreach import foreach_mul_, foreach_norm

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

# A float32 square below 2^-126 has lost digits, or all: those of a tensor together at most 2^-126 for each
# element. Where the sum is 2^-100 for each or more, that is less than 1e-7 of it.
_FAINT = 2.0**-100
_SOME_FAINT = 2.0**-64  # no tensor of up to 2^36 elements below that is faint

_TINIEST = torch.finfo(torch.float32).tiny  # below it float32 loses digits
_LIFT = 2.0**64  # brings every coefficient that float32 gradients can need above that


def power_sums(tensors: list[Tensor], norm_type: float, accumulate: torch.dtype) -> Tensor:
    """``Σ|g|^p`` of each tensor, or ``max|g|`` for p = ∞. [len(tensors)] float64, on their device.

    Sums of squares are accumulated in ``accumulate`` (float32, or float64), or in the tensors' own
    dtype where that is wider; other powers in float64, which they need. On the CPU, where looking at the sums
    costs nothing, squares that overflow float32, or vanish in it, are summed again in float64; elsewhere
    float64 takes them all. So the sums are right for all float32 numbers, and of float64 ones for those
    whose sums float64 holds.
    """
    on_cpu, compiling = tensors[0].is_cpu, torch.compiler.is_compiling()
    given = tensors
    if given[0].is_complex():
        tensors = [torch.view_as_real(t) if norm_type == 2 else _magnitude(t) for t in given]
        if len({t.dtype for t in tensors}) > 1:  # some magnitudes are too large for float32
            tensors = [t.double() for t in tensors]
    if (norm_type != 2 and not math.isinf(norm_type)) or (norm_type == 2 and not on_cpu):
        accumulate = torch.float64
    accumulate = torch.promote_types(accumulate, tensors[0].dtype)
    if norm_type == 2 and accumulate == torch.float32:
        sums = _cpu_sums_of_squares(tensors)
        if not compiling and not _within(sums, _SOME_FAINT):
            _sum_again(sums, tensors, [_FAINT * t.numel() for t in tensors])
        return sums
    norms: Tensor = torch.stack(foreach_norm(tensors, norm_type, dtype=accumulate)).double()
    if math.isinf(norm_type):
        return norms
    return norms.square() if norm_type == 2 else norms.pow(norm_type)


def _magnitude(tensor: Tensor) -> Tensor:
    """|z|, which may be larger than what a complex number can consist of."""
    magnitude = tensor.abs()
    if tensor.dtype == torch.complex128 or not tensor.numel():
        return magnitude
    largest = look_at_one(magnitude.amax())
    if largest is None or not largest < math.inf:
        magnitude = tensor.to(torch.complex128).abs()
    return magnitude


def _within(sums: Tensor, least: float) -> bool:
    """Whether all are above ``least`` and finite, or the host cannot know."""
    smallest, largest = (look(each) for each in torch.aminmax(sums))
    if smallest is None or largest is None:
        return True
    return smallest[0] > least and largest[0] < math.inf


def _sum_again(sums: Tensor, tensors: list[Tensor], faint: list[float]) -> None:
    """In float64, what is not finite or below ``faint``, and put it into ``sums``, of float32 squares."""
    found = [i for i, each in enumerate(look(sums) or ()) if not faint[i] <= each < math.inf]
    if found:
        largest = torch.stack(foreach_norm([tensors[i] for i in found], math.inf))
        pairs = zip(found, look(largest.double()) or (), strict=True)
        found = [i for i, each in pairs if each]  # the others are zeros
    if found:
        norms = foreach_norm([tensors[i] for i in found], 2, dtype=torch.float64)
        sums.index_copy_(0, _whole(found), torch.stack(norms).square_())


# What float64 holds of a norm is more than what it holds of Σ|g|^p: where that is infinite, the sum of
# (|g|/2^k)^p is taken in its place, with the least k that brings every norm within float64.
_DISTANCES = {2.0: 513, 3.0: 683}


def distance(norm_type: float) -> int:
    """The k of :func:`far_power_sums`; 0 where the sums hold every norm that float64 holds."""
    return _DISTANCES.get(norm_type, 0)


def far_power_sums(tensors: list[Tensor], norm_type: float, sums: Tensor) -> Tensor:
    """``Σ(|g|/2^k)^p`` of each tensor, [len(tensors)] float64, for k > 0; ``sums``: their ``Σ|g|^p``.

    Needed of float64 and complex128 tensors only. Reads these once more where a sum is infinite; where the
    host cannot look at the sums without waiting, always.
    """
    k = distance(norm_type)
    # By two factors: 2^-1026 and 2^-2049 are no normal numbers.
    powers = int(k * norm_type)
    near = sums * math.ldexp(1.0, -(powers // 2)) * math.ldexp(1.0, powers // 2 - powers)
    if not tensors or tensors[0].dtype not in (torch.float64, torch.complex128):
        return near
    largest = look(sums.amax())
    if largest is not None and largest[0] < math.inf:
        return near
    infinite = torch.isinf(sums)
    norms = [torch.linalg.vector_norm((t * 2.0**-k).abs(), norm_type) for t in tensors]
    return torch.where(infinite, torch.stack(norms).pow(norm_type), near)


def _cpu_sums_of_squares(tensors: list[Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.stack([t.double().square().sum() for t in tensors])  # one pass, once it is compiled
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = list(map(_flat, tensors))
    shapes = tuple([t.shape for t in tensors])
    # The memory that rows are measured into is kept, for each thread its own.
    kept = sum(map(Tensor.numel, tensors)) <= _KEPT and type(tensors[0]) is Tensor  # no fake one
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
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        return _cut_to_keep(shapes)


def _cut_to_keep(shapes: tuple[torch.Size, ...]) -> _Rows:
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
    num_all = sum(len(members) * num_rows for members, _, _, num_rows in parts)
    norms = torch.empty(num_all, dtype=torch.float32, device="cpu")
    memory = torch.split(norms, [len(members) * num_rows for members, _, _, num_rows in parts])
    return _Rows(
        [
            _Block(members, numel, length, of_rows.view(len(members), num_rows))
            for (members, numel, length, num_rows), of_rows in zip(parts, memory, strict=True)
        ],
        norms,
        _whole([num_rows for members, _, _, num_rows in parts for _ in members]),
        _whole([i for members, *_ in parts for i in members]),
    )


def _whole(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


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
    """Multiply every tensor by one 0-dim coefficient: float32 and narrower ones in float32, rounded once; in
    float64, if the coefficient is, float64 ones."""
    for factor in _factors(tensors[0], coefficient):
        if _narrow_on_cuda(tensors[0]):
            _multiply(tensors, [factor] * len(tensors))
        else:
            foreach_mul_(tensors, factor)


def scale_each_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply each tensor by its own coefficient, [len(tensors)] float32 or float64."""
    for factors in _factors(tensors[0], coefficients):
        if _narrow_on_cuda(tensors[0]):
            _multiply(tensors, factors.unbind())
        else:
            foreach_mul_(tensors, factors.unbind())


def scale_rows_(rows: Tensor, coefficients: Tensor) -> None:
    """Multiply each row of dim 0 by its own coefficient, [rows] float32 or float64."""
    for factors in _factors(rows, coefficients):
        rows.mul_(factors.view(-1, *[1] * (rows.dim() - 1)))


def _factors(tensor: Tensor, coefficients: Tensor) -> list[Tensor]:
    """What tensors of this dtype are multiplied by, one after the other; mostly one.

    A coefficient that is no normal float32 (the norm is 1e38 and more) is taken apart, on the CPU: only
    there the host can see it without waiting. (Triton's kernels take it apart themselves.)
    """
    if coefficients.dtype == torch.float32 or tensor.dtype in (torch.float64, torch.complex128):
        return [coefficients]
    small = (coefficients != 0) & (coefficients < _TINIEST)
    smallest = look(torch.where(small, coefficients, 1.0).amin())
    if smallest is None or smallest[0] == 1:
        return [coefficients.float()]
    lift = torch.ones_like(coefficients).masked_fill_(small, _LIFT)
    return [(coefficients * lift).float(), lift.reciprocal().float()]


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
            magnitude = _magnitude(t)
            coefficient = torch.where(magnitude > bound, bound / magnitude, 1.0)
            if coefficient.element_size() * 2 == t.element_size():
                t.mul_(coefficient)
            else:
                t.copy_(t.to(torch.complex128) * coefficient)
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
