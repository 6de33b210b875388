"""Clip by the norm of the whole gradient."""

from __future__ import annotations

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound, require_norm_type, scale_to
from distclip.strategies._threshold import Schedule, Threshold


class GlobalNorm(Strategy):
    """Scale the whole gradient so that its norm is at most ``max_norm``: its direction stays.

    .. math:: g \\leftarrow g \\cdot \\min(1, \\text{max\\_norm} / (\\|g\\|_p + \\text{eps}))

    Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks" (2013); numbers as
    :func:`torch.nn.utils.clip_grad_norm_`. ``eps=0`` gives optax's and Keras's exact result.

    A norm of 0 leaves the gradient as it is; ∞ gives coefficient 0 and NaN gives NaN, which the clipper's
    ``on_nonfinite`` policy deals with first.

    Args:
        max_norm: largest allowed norm, ≥ 0; ∞ measures and never clips. Or a function of the step, see
            :mod:`distclip.strategies.schedules`.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.
        eps: added to the norm before dividing.

    Raises:
        ValueError: ``max_norm`` or ``eps`` is negative or NaN, or p is none of those.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    """

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
        return Scale(scale_to(norms.total, max_norm, self.eps), threshold)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, norm_type={self.norm_type}"
