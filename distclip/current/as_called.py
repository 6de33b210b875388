"""What a drop-in function was called with, as a strategy."""

from __future__ import annotations

import math

import torch

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, scale_to


class AsCalled(Strategy):
    """GlobalNorm with the ``max_norm`` of the call, which may be another in each."""

    def __init__(self, norm_type: float) -> None:
        super().__init__()
        self.norm_type, self.max_norm = norm_type, math.inf

    def forward(self, norms: Norms) -> Decision:
        return Scale(scale_to(norms.total, self.max_norm, 1e-6), torch.full_like(norms.total, self.max_norm))
