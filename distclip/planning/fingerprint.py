"""A few numbers that tell tensors apart, and that survive the rounding which copies may have drifted by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.torch_private.dtensor import local_of

_SAMPLES = 256  # elements of a tensor that enter its fingerprint
_TOGETHER = 1024  # tensors of one size
_PROJECTIONS = 4
WORDS = _PROJECTIONS + 1  # of a fingerprint: projections of the unit vector, and the logarithm of the norm

# Copies may have drifted by rounding (kernels with atomics, bf16), while tensors that are really
# different agree in all four unit projections to 1 % by chance once in 10^8.
TOLERANCE = 1e-2
# Up to here they are taken for equal to the last bit (of float32), and nothing is said.
EXACT = 1e-9

_ZERO_LOG2 = -1100.0  # stands for log2(0); below log2 of the smallest float64


def fingerprints(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """[len(tensors), WORDS] float64 on ``device``: of each tensor, projections of the unit vector and log2 of
    the norm, of elements from all over it (of all of a small one).

    NaN, which is no evidence, where one of these is not finite: an overflow may well be one rank's alone.
    """
    scattered: dict[tuple[int, torch.device], Tensor] = {}
    samples: list[Tensor] = []
    alike: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}  # few operators serve many tensors
    for i, tensor in enumerate(tensors):
        local = local_of(tensor).detach()
        if local.is_complex():
            local = torch.view_as_real(local.resolve_conj())
        flat = local.reshape(-1)
        numel = flat.numel()
        if numel > _SAMPLES:
            key = (numel, flat.device)
            if key not in scattered:
                # Scattered: an even stride would often see one column of a matrix only.
                scattered[key] = torch.arange(_SAMPLES, device=flat.device) * 2654435761 % numel
            flat = flat[scattered[key]]
        samples.append(flat)
        alike.setdefault((flat.numel(), flat.device, flat.dtype), []).append(i)
    found = torch.empty(len(tensors), WORDS, dtype=torch.float64, device=device)
    for (numel, _, _), members in alike.items():
        for begin in range(0, len(members), _TOGETHER):
            part = members[begin : begin + _TOGETHER]
            rows = torch.stack([samples[i] for i in part]).double()
            found[part] = _project(torch.nn.functional.pad(rows, (0, _SAMPLES - numel))).to(device)
    return found


def _project(samples: Tensor) -> Tensor:
    """[k, _SAMPLES] -> [k, WORDS]"""
    samples = torch.where(samples.isfinite().all(dim=1, keepdim=True), samples, math.nan)
    positions = torch.arange(1, _SAMPLES + 1, dtype=torch.float64, device=samples.device)
    turns = torch.arange(1, _PROJECTIONS + 1, dtype=torch.float64, device=samples.device)
    weights = torch.cos(positions[:, None] * turns * 0.7548776662466927 + turns)  # [_SAMPLES, _PROJECTIONS]
    norm = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
    unit = samples / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([unit @ weights, torch.log2(norm).clamp_min(_ZERO_LOG2)], dim=1)
