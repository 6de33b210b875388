"""A few numbers that tell tensors apart, and that survive the rounding which copies may have drifted by."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_SAMPLES = 256  # elements of a tensor that enter its fingerprint
_PROJECTIONS = 4
WORDS = _PROJECTIONS + 1  # of a fingerprint: projections of the unit vector, and the logarithm of the norm

# Copies may have drifted by rounding (kernels with atomics, bf16), while tensors that are really
# different agree in all four unit projections to 1 % by chance once in 10^8.
TOLERANCE = 1e-2

_ZERO_LOG2 = -1100.0  # stands for log2(0); below log2 of the smallest float64


def sample(tensor: Tensor) -> Tensor:
    """[_SAMPLES] float64: elements from all over the tensor; all of a small one, padded with zeros."""
    local = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()
    if local.is_complex():
        local = torch.view_as_real(local.resolve_conj())
    flat = local.reshape(-1)
    if flat.numel() > _SAMPLES:
        # Scattered: an even stride would often see one column of a matrix only.
        scattered = torch.arange(_SAMPLES, device=flat.device) * 2654435761 % flat.numel()
        flat = flat[scattered]
    return torch.nn.functional.pad(flat.double(), (0, _SAMPLES - flat.numel()))


def project(samples: Tensor) -> Tensor:
    """[k, _SAMPLES] -> [k, WORDS]: projections of the unit vector, and log2 of the norm.

    NaN, which is no evidence, where a sample is not finite: an overflow may well be one rank's alone.
    """
    samples = torch.where(samples.isfinite().all(dim=1, keepdim=True), samples, math.nan)
    positions = torch.arange(1, _SAMPLES + 1, dtype=torch.float64, device=samples.device)
    turns = torch.arange(1, _PROJECTIONS + 1, dtype=torch.float64, device=samples.device)
    weights = torch.cos(positions[:, None] * turns * 0.7548776662466927 + turns)  # [_SAMPLES, _PROJECTIONS]
    norm = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
    unit = samples / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([unit @ weights, torch.log2(norm).clamp_min(_ZERO_LOG2)], dim=1)
