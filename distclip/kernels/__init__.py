"""Arithmetic on this rank's own tensors. Nothing here knows of other ranks.

In come lists of tensors and numbers on their device; out go sums, or the same tensors, changed. Imports
nothing of ``torch.distributed``, and no room but ``torch_private``.

For CUDA and ROCm tensors the sums and the scaling are Triton's (``triton.py``) where Triton is installed
and its kernels run, which is tried once for each device; for all others, and in what ``torch.compile``
traces, they are torch's foreach operators (``foreach.py``). With ``DISTCLIP_TRITON=0`` in the environment
they are foreach operators everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from distclip.kernels import foreach
from distclip.kernels.foreach import (
    clamp_,
    clamp_each_,
    distance,
    far_power_sums,
    fill_where_,
    scale_rows_,
)
from distclip.kernels.looking import look

__all__ = [
    "all_in_triton",
    "clamp_",
    "clamp_each_",
    "distance",
    "far_power_sums",
    "fill_where_",
    "forgo_triton",
    "goes_to_triton",
    "look",
    "power_sums",
    "scale_",
    "scale_each_",
    "scale_rows_",
]

logger = logging.getLogger("distclip")

_in_triton: dict[torch.device, bool] = {}


def power_sums(tensors: list[Tensor], norm_type: float, accumulate: torch.dtype) -> Tensor:
    """``Σ|g|^p`` of each tensor, or ``max|g|`` for p = ∞. [len(tensors)] float64, on their device.

    Sums of squares are accumulated in ``accumulate`` (float32, or float64), or in the tensors' own
    dtype where that is wider; other powers so that they are no less exact. What overflows or vanishes in
    float32 is summed in float64: the sums are right for all float32 numbers.
    """
    if goes_to_triton(tensors[0]):
        from distclip.kernels import triton

        return triton.power_sums(tensors, norm_type, accumulate)
    return foreach.power_sums(tensors, norm_type, accumulate)


def scale_(tensors: list[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor by one 0-dim coefficient, float32 or float64: float32 and narrower ones in
    float32, rounded once (also by what float32 holds no digits of), float64 ones in float64."""
    if goes_to_triton(tensors[0]):
        from distclip.kernels import triton

        return triton.scale_(tensors, coefficient)
    return foreach.scale_(tensors, coefficient)


def scale_each_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply each tensor by its own coefficient, [len(tensors)] float32 or float64, likewise."""
    if goes_to_triton(tensors[0]):
        from distclip.kernels import triton

        return triton.scale_each_(tensors, coefficients)
    return foreach.scale_each_(tensors, coefficients)


def goes_to_triton(tensor: Tensor) -> bool:
    """Whether it is summed and scaled by Triton's kernels."""
    if torch.compiler.is_compiling() or tensor.device.type != "cuda":
        return False
    return _in_triton_on(tensor.device)


def _in_triton_on(device: torch.device) -> bool:
    chosen = _in_triton.get(device)
    if chosen is None:
        if torch.cuda.is_current_stream_capturing():  # when nothing can be compiled, nor tried
            return False
        chosen = _in_triton[device] = _runs_in_triton(device)
    return chosen


def all_in_triton(devices: Iterable[torch.device]) -> bool:
    """Whether Triton's kernels run on all that are GPUs."""
    return all(_in_triton_on(device) for device in devices if device.type == "cuda")


def forgo_triton(devices: Iterable[torch.device]) -> None:
    """Foreach operators from now on: what other ranks, which hold copies of the same gradients, have to use.
    (Two kernels add in two orders, and replicas whose norms differ in the last bit drift apart.)"""
    for device in devices:
        if _in_triton.get(device):
            _in_triton[device] = False
            logger.warning(
                "Triton's kernels run on %s, but not on all ranks (theirs say why): foreach operators clip "
                "on all of them. DISTCLIP_TRITON=0 on every rank chooses them without this message.", device,
            )  # fmt: skip


def _runs_in_triton(device: torch.device) -> bool:
    if os.environ.get("DISTCLIP_TRITON") == "0":
        return False
    try:
        from distclip.kernels import triton
    except ImportError:
        return False
    return triton.works_on(device)
