"""A threshold that is a number, or changes from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from distclip.strategies._base import require_bound, state

Schedule: TypeAlias = Callable[[Tensor], Tensor | float]
"""From the step, 0-dim int64, 0 at the first, to the threshold of that step, 0-dim."""


class Threshold(nn.Module):
    """One threshold of a strategy: a number, or a schedule and the step that it has come to.

    Steps that are skipped or not finite do not count: the strategy's rollback takes the step back with all
    its other buffers. A number has no state at all.

    Raises:
        ValueError: a number is negative or NaN. (What a schedule returns is only known on the device: a
            negative threshold counts as 0 there.)
    """

    step: Tensor  # [] int64, of a schedule only

    def __init__(self, name: str, value: float | Schedule) -> None:
        super().__init__()
        self.name = name
        self.value: float | Schedule = value if callable(value) else require_bound(name, value)
        if callable(value):
            self.register_buffer("step", state((), 0, torch.int64))

    def peek(self, like: Tensor) -> Tensor:
        """The threshold of this step, 0-dim as ``like``, without taking the step."""
        return self._scheduled(like) if callable(self.value) else like.new_full((), self.value)

    def advance(self, like: Tensor) -> tuple[float | Tensor, Tensor]:
        """The threshold of this step, to compute with and, 0-dim as ``like``, to report."""
        if not callable(self.value):
            return self.value, torch.full_like(like, self.value)
        threshold = self._scheduled(like)
        self.step += 1
        return threshold, threshold

    def _scheduled(self, like: Tensor) -> Tensor:
        assert callable(self.value)
        value = self.value(self.step.clone())
        if not isinstance(value, Tensor):
            value = like.new_full((), value)
        if value.dim() != 0:
            raise ValueError(
                f"{self.name}={self.value!r} returned shape {tuple(value.shape)}: expected 0-dim"
            )
        return value.to(like).clamp(min=0)


def scale_above(norm: Tensor, bound: Tensor, eps: float) -> Tensor:
    """``bound / (norm + eps)`` where the norm is above the bound, exactly 1 where it is not; NaN for NaN.

    A learned bound is as small as the norms that it was learned from: ``eps`` is a thousandth of the norm at
    most, or it would decide and not the bound. Never 0 where ``norm`` is finite and ``bound`` positive,
    though float32 may have no such small number.
    """
    margin = (norm * 1e-3).clamp(max=eps)
    return torch.where(norm <= bound, 1.0, not_zero((bound / (norm + margin)).to(norm.dtype), norm, bound))


def not_zero(coefficient: Tensor, norm: Tensor, bound: Tensor) -> Tensor:
    """``coefficient``, or the least normal float32 where that would be 0 for a finite norm and a positive
    bound; all of one shape, or 0-dim."""
    least = (torch.isfinite(norm) & (bound > 0)).to(coefficient.dtype) * torch.finfo(torch.float32).tiny
    return torch.maximum(coefficient, least)
