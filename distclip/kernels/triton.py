"""Kernels in Triton, for CUDA (and ROCm) tensors: one launch for a whole list of tensors.

The kernels find the tensors through a table of addresses, and their share of the work through a table of
chunks, so one launch serves any number of tensors of any sizes. Two things are kept between steps:

- the chunks, which depend on the sizes alone, for each stream its own;
- the addresses, checked by ``data_ptr()``. Gradient buffers move: a new table is then copied from pinned
  memory without waiting. No table is ever overwritten, on the host or on the device, so no kernel and no
  copy under way can see it change: the memory of one that is dropped is given out again by torch's
  allocators, which know what is still under way on the stream that it was made for.

Under CUDA-graph capture a copy from pinned memory would be repeated by every replay, from memory that may
be another's by then, and compiling is not allowed. Captured is therefore only what has run before for
tensors of the same sizes; what it needs is then kept for as long as the process lives, since nobody says
when a graph is dropped. Addresses that are not yet on the device are written there by kernels that carry
them as arguments. Everything else is captured as foreach operators.

Not taken, and left to foreach: complex and float64 tensors, accumulation in float64, powers other than
``POWERS``, tensors with gaps, and coefficients that are not on the tensors' device.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from distclip.kernels import foreach, programs
from distclip.torch_private.foreach import foreach_add_

logger = logging.getLogger("distclip")

POWERS = (0.5, 1.0, 2.0, 3.0, math.inf)

# tests/gpu/sweep.py tries others.
_BLOCK, _WARPS = 1024, 4  # elements that one program reads at once: 8 for each of its 128 threads
_REPEAT = 4  # float32 additions in a row, before the sum goes on in float64
# A chunk is a multiple of _BLOCK * _REPEAT. There are about a thousand, whatever the device, so that
# replicas on unlike devices add in the same order; huge lists get more, small ones fewer.
_CHUNKS, _SMALLEST, _LARGEST = 1024, _BLOCK * _REPEAT, 1 << 18
_PROGRAMS = 2048  # that scale: what an H200 runs at a time, and what an early-out costs
_KEPT = 1 << 21  # chunks of all layouts: 32 MB on the device
_OF_EACH = 1024  # that each counts in addition: no more than 2048 layouts
_OPTIONS = {"enable_fp_fusion": True}  # x * x + total rounds once; left out, Triton 3.9 warns


@dataclass(frozen=True, eq=False)
class _Layout:
    """The chunks of tensors of some sizes, on their device. Holds no tensor of the caller's.

    Attributes:
        tables: addresses that have been brought to the device.
        ran: the kernels that have run on it.
    """

    owners: Tensor  # [num_chunks] int32
    starts: Tensor  # [num_chunks] int64, bytes
    counts: Tensor  # [num_chunks] int32
    bounds: Tensor  # [num_tensors + 1] int32
    most: int  # chunks of one tensor
    tables: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    ran: set[tuple[str, float]] = field(default_factory=set)

    @property
    def num_chunks(self) -> int:
        return self.owners.numel()

    @property
    def weight(self) -> int:
        return _OF_EACH + self.num_chunks

    @property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.owners, self.starts, self.counts

    @staticmethod
    def of(numels: Sequence[int], itemsize: int, device: torch.device) -> _Layout:
        size = min(_LARGEST, max(_SMALLEST, 1 << (max(sum(numels) // _CHUNKS, 1).bit_length() - 1)))
        sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
        chunks = (sizes + size - 1) // size
        bounds = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
        owners = torch.arange(len(numels), device="cpu").repeat_interleave(chunks)
        starts = (torch.arange(owners.numel(), device="cpu") - bounds[owners]) * size
        return _Layout(
            _to_device(owners.int(), device),
            _to_device(starts * itemsize, device),
            _to_device((sizes[owners] - starts).clamp(max=size).int(), device),
            _to_device(bounds.int(), device),
            int(chunks.max()),
        )


_Sizes: TypeAlias = tuple[torch.device, torch.dtype, tuple[int, ...]]
_layouts: dict[tuple[_Sizes, int], _Layout] = {}  # by the stream as well: what DDP's hooks run on changes
_captured: dict[int, tuple[_Layout, Tensor]] = {}  # what graphs read, by the id of the table
_lock = threading.Lock()  # for these: autograd has a thread for each device, and users have their own


def power_sums(tensors: list[Tensor], norm_type: float, accumulate: torch.dtype) -> Tensor:
    """``Σ|g|^p`` of each tensor, or ``max|g|`` for p = ∞. [len(tensors)] float64, on their device.

    Squares, absolute values and roots are float32, added four by four in float32, then in float64; cubes
    are float64. The order is fixed: the same numbers give the same bits. A chunk whose sum float32 may not
    hold (it overflowed, or squares vanished) is read once more, and summed in float64; so is one of zeros.
    """
    if norm_type in POWERS and accumulate == torch.float32 and tensors[0].dtype in programs.DTYPES:
        with _on(tensors[0].device):
            found = _find(tensors, ("power_sums", norm_type))
            if found is not None:
                return _power_sums(*found, norm_type, tensors[0].dtype)
    return foreach.power_sums(tensors, norm_type, accumulate)


def _power_sums(layout: _Layout, table: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    power = 0.0 if math.isinf(norm_type) else float(norm_type)
    num_tensors = table.numel()
    sums = torch.empty(layout.num_chunks, dtype=torch.float64, device=table.device)
    if layout.num_chunks:
        programs.sum_chunks[(layout.num_chunks,)](
            table, *layout.chunks, sums,
            P=power, DTYPE=programs.DTYPES[dtype], BLOCK=_BLOCK, REPEAT=_REPEAT, num_warps=_WARPS, **_OPTIONS,
        )  # fmt: skip
    if layout.most == 1 and layout.num_chunks == num_tensors:
        return sums
    joined = torch.empty(num_tensors, dtype=torch.float64, device=table.device)
    block, warps = (128, 1) if layout.most <= 128 else (2048, 8)
    programs.sum_tensors[(num_tensors,)](
        sums, layout.bounds, joined, P=power, BLOCK=block, num_warps=warps, **_OPTIONS
    )
    return joined


def scale_(tensors: list[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor by one 0-dim coefficient, float32 or float64 (in float32, rounded once).

    Where that is exactly 1, one number is read and nothing is written.
    """
    if not _scale(tensors, coefficient, each=False):
        foreach.scale_(tensors, coefficient)


def scale_each_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply each tensor by its own coefficient, [len(tensors)]; not those of exactly 1."""
    if not _scale(tensors, coefficients, each=True):
        foreach.scale_each_(tensors, coefficients)


def _scale(tensors: list[Tensor], coefficients: Tensor, *, each: bool) -> bool:
    """Whether it could be done."""
    first = tensors[0]
    if first.dtype not in programs.DTYPES or coefficients.device != first.device:
        return False
    coefficients = coefficients.to(torch.float64)
    with _on(first.device):
        found = _find(tensors, ("scale", float(each)))
        if found is None:
            return False
        layout, table = found
        if layout.num_chunks:
            programs.scale_chunks[(min(layout.num_chunks, _PROGRAMS),)](
                table, *layout.chunks, layout.num_chunks, coefficients.contiguous(),
                EACH=each, DTYPE=programs.DTYPES[first.dtype], BLOCK=_BLOCK, num_warps=_WARPS, **_OPTIONS,
            )  # fmt: skip
            if not any(map(Tensor.is_inference, tensors)):  # these have none
                torch.autograd.graph.increment_version(tensors)
    return True


def _find(tensors: list[Tensor], kernel: tuple[str, float]) -> tuple[_Layout, Tensor] | None:
    """The chunks and the addresses, for a kernel that is launched next; None where that cannot be."""
    # map() loops in C: a third of the time that a comprehension takes.
    if not (all(map(Tensor.is_contiguous, tensors)) or all(map(_dense, tensors))):
        return None
    device = tensors[0].device
    addresses = tuple(map(Tensor.data_ptr, tensors))
    numels = tuple(map(Tensor.numel, tensors))
    with _lock:
        return _found((device, tensors[0].dtype, numels), addresses, tensors[0].element_size(), kernel)


def _found(
    sizes: _Sizes, addresses: tuple[int, ...], itemsize: int, kernel: tuple[str, float]
) -> tuple[_Layout, Tensor] | None:
    device, _, numels = sizes
    if _capturing(device):  # on a stream of its own
        made = (layout for (of, _), layout in _layouts.items() if of == sizes and kernel in layout.ran)
        layout = next(made, None)
        if layout is None:
            return None
        table = layout.tables.get(addresses)
        if table is None:
            table = _written_by_kernels(addresses, device)
        _captured[id(table)] = layout, table
        return layout, table
    key = (sizes, _stream(device))
    layout = _layouts.get(key)
    if layout is None:
        layout = _Layout.of(numels, itemsize, device)
        if sum(each.weight for each in _layouts.values()) + layout.weight > _KEPT:
            _layouts.clear()  # gradients that come and go: keep the memory bounded
        _layouts[key] = layout
    table = layout.tables.get(addresses)
    if table is None:
        while len(layout.tables) >= max(2, 1024 // len(addresses)):
            layout.tables.pop(next(iter(layout.tables)))
        pinned = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        table = layout.tables[addresses] = pinned.to(device, non_blocking=True)
    layout.ran.add(kernel)
    return layout, table


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that waits for nothing: torch keeps the pinned memory until it has been read."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _written_by_kernels(addresses: Sequence[int], device: torch.device) -> Tensor:
    """[len(addresses)] int64. foreach kernels carry their scalars as arguments, exactly."""
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    foreach_add_(list(table.unbind()), list(addresses))
    return table


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def works_on(device: torch.device) -> bool:
    """Whether the kernels can be compiled and launched there. Logs why, if not."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        probe = [torch.ones(1, dtype=torch.float32, device=device)]
        power_sums(probe, 2.0, torch.float32)
        scale_(probe, torch.ones((), dtype=torch.float64, device=device))
    except Exception as error:  # no C compiler, an old driver, …: clipping goes on without
        logger.warning(
            "Triton's kernels do not run on %s (%s: %s): foreach operators clip instead, with more launches. "
            "DISTCLIP_TRITON=0 chooses them without this message.", device, type(error).__name__, error,
        )  # fmt: skip
        return False
    return True
