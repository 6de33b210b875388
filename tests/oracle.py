"""What the right answer is, the obvious way: gather every gradient whole, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def dense(tensor: Tensor | None) -> Tensor | None:
    """The whole tensor in float64 (complex128), on every rank."""
    if tensor is None:
        return None
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    whole = whole.detach()
    whole = whole.to_dense() if whole.layout != torch.strided else whole
    return whole.to(torch.complex128 if whole.is_complex() else torch.float64).clone()


def dense_gradients(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    return [dense(p.grad) for p in parameters]


def norm(gradients: Iterable[Tensor | None], p: float = 2.0) -> float:
    """The p-norm of all gradients taken together, in float64 from the definition."""
    flat = [g.abs().flatten() for g in gradients if g is not None and g.numel()]
    if not flat:
        return 0.0
    every = torch.cat(flat)
    if math.isinf(p):
        return every.max().item()
    return every.pow(p).sum().pow(1 / p).item()
