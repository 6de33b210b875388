"""Thresholds that change with the step.

A threshold may be any callable from the step (0-dim int64 tensor, 0 at the first step, on the norms'
device) to the threshold of that step (0-dim). It is called once for every step, must be the same function
on every rank, and should use torch operations only: reading the step (``.item()``, ``if step < 10``) waits
for the device. Steps that are skipped or not finite do not advance it, and the step is saved with the
strategy's state. The function itself is not saved.

Tied to the learning rate: give the threshold the formula that the learning rate has. ::

    def lr_lambda(step):  # of torch.optim.lr_scheduler.LambdaLR
        return min(1.0, (step + 1) / 1000)

    clipper = distclip.Clipper(model, GlobalNorm(Warmup(0.001, 1.0, steps=999)))

A callable that reads ``optimizer.param_groups[0]["lr"]`` works too, and costs no synchronisation as long as
the rate is a Python float; but it then depends on more than the norms and the strategy's state, so a replay
from a log does not reproduce it. That is why there is no class for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.strategies._base import require_bound
from distclip.strategies._history import require_count


@dataclass(frozen=True)
class Warmup:
    """Linear from ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` from there on.

    .. math:: \\tau(t) = \\text{start} + (\\text{end} - \\text{start}) \\cdot \\min(t / \\text{steps}, 1)

    Raises:
        ValueError: ``start`` or ``end`` is negative or not finite, or ``steps`` is no positive integer.

    Example:
        >>> clipper = distclip.Clipper(model, GlobalNorm(Warmup(10.0, 1.0, steps=1000)))
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _require_ends(self.start, self.end)
        require_count("steps", self.steps)

    def __call__(self, step: Tensor) -> Tensor:
        return _between(self.start, self.end, _progress(step, self.steps))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` from there on.

    .. math:: \\tau(t) = \\text{end} + (\\text{start} - \\text{end}) \\cdot
        \\tfrac12 (1 + \\cos(\\pi \\min(t / \\text{steps}, 1)))

    Raises:
        ValueError: ``start`` or ``end`` is negative or not finite, or ``steps`` is no positive integer.

    Example:
        >>> clipper = distclip.Clipper(model, GlobalNorm(Cosine(1.0, 0.1, steps=10_000)))
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _require_ends(self.start, self.end)
        require_count("steps", self.steps)

    def __call__(self, step: Tensor) -> Tensor:
        return _between(self.start, self.end, (1 - torch.cos(math.pi * _progress(step, self.steps))) / 2)


def _require_ends(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        if math.isinf(require_bound(name, value)):
            raise ValueError(f"{name}={value!r}: expected a finite number")


def _progress(step: Tensor, steps: int) -> Tensor:
    return (step.double() / steps).clamp(max=1)  # float32 cannot count beyond 2**24


def _between(start: float, end: float, share: Tensor) -> Tensor:
    """[] float32, exact at both ends."""
    return (start * (1 - share) + end * share).float()
