# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (What is compiled here is not Python: its values have no Python types.)
"""The programs that run on the device, in Triton's language.

Tensors are found by address; a chunk is a stretch of one tensor, and starts at a multiple of 16 bytes from
the tensor's start. The addresses themselves may be any multiple of the element's size.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Below 2^-100 for each element, squares that vanish in float32 may be more than 1e-7 of their sum.
_FAINT: tl.constexpr = tl.constexpr(2.0**-100)
_TINIEST: tl.constexpr = tl.constexpr(2.0**-126)  # below it float32 loses digits
_LIFT: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def _add_powers(total, x, P: tl.constexpr):
    """``total`` + |x|^P; for P = 0 the larger of ``total`` and |x|, both as bits.

    The bits of floats ≥ 0 are ordered as the floats are, with NaN above infinity: the maximum keeps it.
    """
    if P == 0:
        total = tl.maximum(total, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    elif P == 1:
        total += tl.abs(x)
    elif P == 2:
        total += x * x
    elif P == 0.5:
        total += tl.sqrt_rn(tl.abs(x))
    else:
        wide = tl.abs(x).to(tl.float64)  # float32 has no room for the cubes of 1e13 and 1e-13
        total += wide * wide * wide
    return total


@triton.jit
def _zeros(P: tl.constexpr, BLOCK: tl.constexpr):
    return tl.zeros([BLOCK], tl.int32 if P == 0 else tl.float64 if P == 3 else tl.float32)


@triton.jit
def _join(total, some, P: tl.constexpr):
    return tl.maximum(total, some) if P == 0 else total + some.to(tl.float64)


@triton.jit
def _add_whole(total, pointer, whole, P: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr):
    """The powers of the first ``whole`` elements, a multiple of BLOCK * REPEAT."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK * REPEAT):
        some = _zeros(P, BLOCK)
        for i in tl.static_range(REPEAT):
            some = _add_powers(some, tl.load(pointer + start + i * BLOCK + lanes).to(tl.float32), P)
        total = _join(total, some, P)
    return total


@triton.jit
def _sum_exactly(pointer, count, P: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the powers, P being 1 or 2, each of them in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        x = tl.load(pointer + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float32)
        wide = tl.abs(x).to(tl.float64)
        total += wide * wide if P == 2 else wide
    return tl.sum(total, 0)


@triton.jit
def sum_chunks(
    addresses,  # [num_tensors] int64
    owners,  # [num_chunks] int32, which tensor
    starts,  # [num_chunks] int64, bytes into it
    counts,  # [num_chunks] int32, elements
    out,  # [num_chunks] float64
    P: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    REPEAT: tl.constexpr,
):
    chunk = tl.program_id(0)
    count = tl.load(counts + chunk)
    address = tl.load(addresses + tl.load(owners + chunk)) + tl.load(starts + chunk)
    total = _zeros(0 if P == 0 else 3, BLOCK)
    whole = count // (BLOCK * REPEAT) * (BLOCK * REPEAT)
    # The same elements in the same lanes and order: where a tensor lies does not change its sum.
    if address % 16 == 0:  # 16 bytes in one load
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        total = _add_whole(total, aligned, whole, P, BLOCK, REPEAT)
    else:
        total = _add_whole(total, address.to(tl.pointer_type(DTYPE)), whole, P, BLOCK, REPEAT)
    pointer = address.to(tl.pointer_type(DTYPE))  # its own: `multiple_of` marks the value it is given
    lanes = tl.arange(0, BLOCK)
    for start in range(whole, count, BLOCK):
        x = tl.load(pointer + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float32)
        total = _join(total, _add_powers(_zeros(P, BLOCK), x, P), P)
    if P == 0:
        largest = tl.max(total, 0).to(tl.float32, bitcast=True)
        tl.store(out + chunk, largest.to(tl.float64))
    else:
        joined = tl.sum(total, 0)
        # What float32 may not hold is read once more, but only then (or if all are 0).
        if P == 1 or P == 2:  # noqa: SIM102  (known when it is compiled)
            if not ((joined < float("inf")) & (joined >= count * _FAINT)):
                joined = _sum_exactly(pointer, count, P, BLOCK)
        tl.store(out + chunk, joined)


@triton.jit
def sum_tensors(
    chunks,  # [num_chunks] float64
    bounds,  # [num_tensors + 1] int32, the first chunk of each
    out,  # [num_tensors] float64
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    end = tl.load(bounds + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64 if P == 0 else tl.float64)
    for start in range(tl.load(bounds + tensor), end, BLOCK):
        some = tl.load(chunks + start + lanes, mask=start + lanes < end, other=0.0)
        if P == 0:
            total = tl.maximum(total, some.to(tl.int64, bitcast=True))
        else:
            total += some
    if P == 0:
        tl.store(out + tensor, tl.max(total, 0).to(tl.float64, bitcast=True))
    else:
        tl.store(out + tensor, tl.sum(total, 0))


@triton.jit
def _multiply(pointer, first, second, whole, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        x = tl.load(pointer + start + lanes).to(tl.float32)
        tl.store(pointer + start + lanes, (x * first * second).to(DTYPE))


@triton.jit
def _multiply_chunk(
    addresses, starts, counts, chunk, owner, coefficient, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """By a float64 coefficient, rounded to float32; one that float32 holds no digits of in two factors."""
    small = (coefficient != 0) & (coefficient < _TINIEST)
    first = tl.where(small, coefficient * _LIFT, coefficient).to(tl.float32)
    second = tl.where(small, 1.0 / _LIFT, 1.0).to(tl.float32)
    count = tl.load(counts + chunk)
    address = tl.load(addresses + owner) + tl.load(starts + chunk)
    whole = count // BLOCK * BLOCK
    if address % 16 == 0:
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        _multiply(aligned, first, second, whole, DTYPE, BLOCK)
    else:
        _multiply(address.to(tl.pointer_type(DTYPE)), first, second, whole, DTYPE, BLOCK)
    if whole < count:
        pointer = address.to(tl.pointer_type(DTYPE))
        at = whole + tl.arange(0, BLOCK)
        x = tl.load(pointer + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(pointer + at, (x * first * second).to(DTYPE), mask=at < count)


# What is compiled must not depend on how many chunks there are or where a coefficient lies: a CUDA graph
# must find it compiled.
@triton.jit(do_not_specialize=["num_chunks"], do_not_specialize_on_alignment=["coefficients"])
def scale_chunks(
    addresses,  # these four as above
    owners,
    starts,
    counts,
    num_chunks,
    coefficients,  # [num_tensors] float64 if EACH, else []
    EACH: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply, unless the coefficient is exactly 1: then nothing is read, and nothing written."""
    first, step = tl.program_id(0), tl.num_programs(0)
    if EACH:
        for chunk in range(first, num_chunks, step):
            owner = tl.load(owners + chunk)
            coefficient = tl.load(coefficients + owner)
            if coefficient != 1.0:
                _multiply_chunk(addresses, starts, counts, chunk, owner, coefficient, DTYPE, BLOCK)
    else:
        coefficient = tl.load(coefficients)
        if coefficient != 1.0:
            for chunk in range(first, num_chunks, step):
                owner = tl.load(owners + chunk)
                _multiply_chunk(addresses, starts, counts, chunk, owner, coefficient, DTYPE, BLOCK)
