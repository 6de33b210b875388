"""Clip the norm of every parameter's gradient by itself."""

from __future__ import annotations

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound, require_norm_type, scale_to
from distclip.strategies._threshold import Schedule, Threshold


class PerParameter(Strategy):
    """Scale each parameter's gradient so that its own norm is at most ``max_norm`` (layer-wise clipping).

    .. math:: g_i \\leftarrow g_i \\cdot \\min(1, \\text{max\\_norm} / (\\|g_i\\|_p + \\text{eps}))

    Keras calls it ``clipnorm`` (with ``eps=0``). A parameter split over ranks is clipped by the norm of
    the whole parameter. One number per parameter travels in the step's single collective.

    Args:
        max_norm: largest allowed norm of each parameter's gradient, ≥ 0. Or a function of the step, see
            :mod:`distclip.strategies.schedules`.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.
        eps: added to the norm before dividing.

    Raises:
        ValueError: ``max_norm`` or ``eps`` is negative or NaN, or p is none of those.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.PerParameter(0.1))
    """

    per_parameter = True

    def __init__(
        self, max_norm: float | Schedule = 1.0, norm_type: float | str = 2.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.threshold = Threshold("max_norm", max_norm)
        self.norm_type = require_norm_type(norm_type)
        self.eps = require_bound("eps", eps)

    @property
    def max_norm(self) -> float | Schedule:
        return self.threshold.value

    def forward(self, norms: Norms) -> Decision:
        max_norm, threshold = self.threshold.advance(norms.total)
        return Scale(scale_to(norms.slots, max_norm, self.eps), threshold)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, norm_type={self.norm_type}"
