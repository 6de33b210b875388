"""Adaptive gradient clipping: each unit's gradient against the size of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._base import Strategy, listed, require_bound, state
from distclip.strategies._pattern import Patterns

_LEAST_NORM = 1e-6  # of a gradient that is divided by, as in timm


class AGC(Strategy):
    """Scale each unit's gradient so that its norm is at most a fraction of the norm of its weights.

    A unit u is a row of dim 0 of a parameter (an output neuron, a filter), or a whole parameter of one dim
    or none.

    .. math::
        \\tau_u = \\text{clipping} \\cdot \\max(\\|w_u\\|, \\text{eps}), \\quad
        g_u \\leftarrow g_u \\cdot \\tau_u / \\max(\\|g_u\\|, 10^{-6}) \\text{ where } \\|g_u\\| > \\tau_u

    Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization"
    (arXiv 2102.06171); numbers as timm's ``adaptive_clip_grad``. The floor ``eps`` lets units that start as
    zeros leave zero. Units split over ranks are joined first: the squares of all units, of gradients and
    weights, travel in the step's single collective.

    NaN or ∞ in one unit makes the total non-finite, which the clipper's ``on_nonfinite`` policy deals with.
    Nothing is remembered.

    Args:
        clipping: largest allowed ratio of a unit's gradient norm to its weight norm, ≥ 0.
        eps: weight norms below this count as this, ≥ 0.
        exclude: patterns (as :mod:`fnmatch`) of parameter names that are never clipped; the paper leaves out
            the last layer, e.g. ``("head.*",)``.

    Raises:
        ValueError: ``clipping`` or ``eps`` is negative or NaN. From the first clip: a pattern fits no
            parameter that trains; or a plain parameter of several dims is declared sharded, which does not
            say along which dim.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.AGC(0.01, exclude=("head.*",)))
    """

    per_unit = True

    excluded: Tensor  # [num_units] bool

    def __init__(self, clipping: float = 0.01, *, eps: float = 1e-3, exclude: Iterable[str] = ()) -> None:
        super().__init__()
        self.clipping = require_bound("clipping", clipping)
        self.eps = require_bound("eps", eps)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.register_buffer("excluded", state((0,), 0, torch.bool), persistent=False)

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns("AGC(exclude=...)", self.exclude)

    def prepare(self, parameters: Sequence[ParameterInfo]) -> None:
        self._patterns.require_fit(parameters)
        left_out: list[bool] = []
        for p in parameters:
            left_out += [self._patterns.first(p) is not None] * p.units
        self.excluded = listed(left_out, torch.bool)

    def forward(self, norms: Norms) -> Decision:
        if norms.weights is None:
            raise ValueError(
                "AGC needs the norms of the weights: a history of gradient norms cannot replay it"
            )
        bound = self.clipping * norms.weights.clamp(min=self.eps)
        within = (norms.slots <= bound) | self.excluded
        # ~(n > bound) would let a NaN pass for "within".
        coefficient = torch.where(within, 1.0, bound / norms.slots.clamp(min=_LEAST_NORM))
        return Scale(coefficient.clamp(max=1.0), bound)

    def extra_repr(self) -> str:
        return f"clipping={self.clipping}, eps={self.eps}"
