"""Clip each element by its value."""

from __future__ import annotations

import math

from distclip._decision import Clamp, Decision
from distclip._norms import Norms
from distclip.strategies._base import Strategy
from distclip.strategies._threshold import Schedule, Threshold


class Value(Strategy):
    """Clamp every gradient element to ``[-clip_value, clip_value]``, a complex one to that magnitude.

    This clips the ∞-norm, and changes the gradient's direction: (100, 1) becomes (v, 1). So the norms it
    asks for, and reports, are ∞-norms: ``total_norm`` is the largest magnitude of any element, and
    ``clipped_norm`` is that after clamping.

    As :func:`torch.nn.utils.clip_grad_value_`. In bfloat16 and float16 the bound is rounded to the
    gradient's dtype. NaN stays NaN and ∞ becomes the bound (a complex ∞, which has no direction, becomes
    NaN), unless the clipper's ``on_nonfinite`` policy deals with them first.

    Args:
        clip_value: the bound v, ≥ 0. Or a function of the step, see :mod:`distclip.strategies.schedules`.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.Value(0.5))
    """

    norm_type = math.inf

    def __init__(self, clip_value: float | Schedule) -> None:
        super().__init__()
        self.threshold = Threshold("clip_value", clip_value)

    @property
    def clip_value(self) -> float | Schedule:
        return self.threshold.value

    def forward(self, norms: Norms) -> Decision:
        _, bound = self.threshold.advance(norms.total)
        return Clamp(bound)

    def extra_repr(self) -> str:
        return f"clip_value={self.clip_value}"
