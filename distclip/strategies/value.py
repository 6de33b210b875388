"""Clip each element by its value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip.decide.decision import Clamp, Decision
from distclip.decide.norms import Norms
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
        measure_direction: also measure how far the direction turns: ``report.direction`` is the cosine
            between the gradient before and after, ``Σ g·c / (‖g‖‖c‖)`` with c the clamped gradient, and the
            reported norms are 2-norms. Still one collective, with three more numbers; one more pass over the
            gradients.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.Value(0.5))
    """

    norm_type = math.inf

    def __init__(self, clip_value: float | Schedule, *, measure_direction: bool = False) -> None:
        super().__init__()
        self.threshold = Threshold("clip_value", clip_value)
        if measure_direction:
            self.norm_type, self.num_extra = 2.0, 2

    @property
    def clip_value(self) -> float | Schedule:
        return self.threshold.value

    def forward(self, norms: Norms) -> Decision:
        _, bound = self.threshold.advance(norms.total)
        if norms.extra is None:
            return Clamp(bound)
        squares, products = norms.extra.unbind()
        lengths = norms.total.double() * squares.sqrt()
        direction = torch.where(lengths > 0, products / lengths, 1.0).clamp(max=1.0)
        clipped_norm = torch.minimum(squares.sqrt().float(), norms.total)
        return Clamp(bound, clipped_norm=clipped_norm, direction=direction.float())

    def elementwise(self, gradient: Tensor) -> Tensor:
        """``Σ c²`` and ``Σ g·c``, with c the clamped gradient."""
        g = torch.view_as_real(gradient).double() if gradient.is_complex() else gradient.double()
        magnitude = gradient.abs().double()
        bound = self.threshold.peek(magnitude)
        shrink = torch.where(magnitude > bound, bound / magnitude, 1.0)
        shrink = shrink.unsqueeze(-1) if gradient.is_complex() else shrink
        clamped = g * shrink
        return torch.stack([clamped.square().sum(), (g * clamped).sum()])

    def extra_repr(self) -> str:
        return f"clip_value={self.clip_value}"
