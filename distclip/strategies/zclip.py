"""Clip norms that stand out from their moving average."""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound, state
from distclip.strategies._history import require_count, teaches
from distclip.strategies._threshold import scale_above


class ZClip(Strategy):
    """Scale the gradient down where its norm is an outlier by its z-score, the further out the more.

    .. math:: z = \\frac{n - \\mu}{\\sigma + \\text{eps}}, \\qquad
        \\tau = \\mu + \\frac{k\\,\\sigma}{z / k} \\text{ where } z > k, \\qquad
        g \\leftarrow g \\cdot \\min(1, \\min(\\tau, \\text{max\\_norm}) / (n + \\text{eps}))

    with k = ``z_threshold``. The averages are then fed x = τ where z > k, else n:
    μ' = αμ + (1−α)x, and σ'² = ασ² + (1−α)(x − μ')².

    Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (arXiv 2504.02507); numbers as the
    public ``zclip`` package with its defaults (z-score mode, adaptive scaling). It differs where that one
    breaks: there a single NaN, or an ∞ in the warm-up, becomes part of the averages and no spike is ever
    clipped again.

    The first ``warmup`` steps are clipped at ``max_norm`` only; their mean and population variance start
    the averages. A norm of 0 leaves the gradient as it is and teaches nothing: a warm-up of zeros would have
    every later gradient multiplied by 0. A step whose norm is ∞ or NaN changes no state either.

    And in one more way it differs from that package, whose averages hardly move while they are fed reduced
    norms (with σ = 0, not at all), so that a norm that doubles for good is clipped to its old level for ever:
    after ``patience`` outliers in a row, norms of 0, ∞ and NaN not counted, the warm-up begins anew. So a
    level that stays is learned within ``patience + warmup`` steps.

    Args:
        alpha: smoothing factor of both averages, in [0, 1].
        z_threshold: k > 0.
        max_norm: largest allowed norm in any case, ≥ 0; ∞ leaves all to the z-score.
        warmup: number of steps that start the averages, ≥ 1.
        eps: added to σ, and to the norm before dividing (there 10⁻³ of the norm at most).
        patience: number of outliers in a row that are a new level, ≥ 1.

    The report's threshold is the norm that the gradient was brought to or, where it was left alone, the
    smallest one that would have been clipped.

    Raises:
        ValueError: an argument is not in its range.

    Example:
        >>> clipper = distclip.Clipper(model, ZClip(z_threshold=2.5, max_norm=1.0))
    """

    mean: Tensor  # [] float64
    variance: Tensor  # [] float64
    first: Tensor  # [warmup] float32, the norms of the warm-up
    seen: Tensor  # [] int64, norms since it began
    outliers: Tensor  # [] int64, the latest norms in a row that were

    patience: int = 100  # of those that 0.1.0 has pickled

    sizes = {"first": "warmup"}  # noqa: RUF012  # never changed
    since = ("outliers",)

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        max_norm: float = 1.0,
        *,
        warmup: int = 25,
        eps: float = 1e-6,
        patience: int = 100,
    ) -> None:
        super().__init__()
        self.alpha = require_bound("alpha", alpha)
        self.z_threshold = require_bound("z_threshold", z_threshold)
        if self.alpha > 1 or self.z_threshold == 0:
            raise ValueError(f"{alpha=}, {z_threshold=}: expected at most 1, and a positive number")
        self.max_norm = require_bound("max_norm", max_norm)
        self.warmup = require_count("warmup", warmup)
        self.eps = require_bound("eps", eps)
        self.patience = require_count("patience", patience)
        self.register_buffer("mean", state((), 0, torch.float64))
        self.register_buffer("variance", state((), 0, torch.float64))
        self.register_buffer("first", state((warmup,), 0, torch.float32))
        self.register_buffer("seen", state((), 0, torch.int64))
        self.register_buffer("outliers", state((), 0, torch.int64))

    def forward(self, norms: Norms) -> Decision:
        n, k = norms.total.double(), self.z_threshold
        warm = self.seen >= self.warmup
        std = self.variance.sqrt()
        z = (n - self.mean) / (std + self.eps)
        # States that were saved by 0.1.0 may have learned from zeros only.
        spike = warm & (z > k) & (self.mean > 0)
        reduced = self.mean + k * std / (z / k)
        target = torch.where(spike, reduced, torch.inf).clamp(max=self.max_norm).float()
        tolerated = torch.where(warm, self.mean + k * (std + self.eps), torch.inf).clamp(max=self.max_norm)
        self._learn(warm, torch.where(spike, reduced, n), teaches(norms.total))
        self._look_for_a_new_level(spike, teaches(norms.total))
        threshold = torch.where(spike, target, tolerated.float())
        return Scale(scale_above(norms.total, target, self.eps), threshold)

    def _learn(self, warm: Tensor, fed: Tensor, teaches: Tensor) -> None:
        position = self.seen.clamp(max=self.warmup - 1).view(1)
        kept = self.first.gather(0, position)
        self.first.scatter_(0, position, torch.where(teaches & ~warm, fed.float(), kept))
        self.seen += teaches
        ready = self.seen == self.warmup
        first = self.first.double()
        mean = torch.where(ready, first.mean(), self.mean)
        variance = torch.where(ready, first.var(correction=0), self.variance)
        moved = self.alpha * self.mean + (1 - self.alpha) * fed
        spread = self.alpha * self.variance + (1 - self.alpha) * (fed - moved).square()
        self.mean.copy_(torch.where(warm & teaches, moved, torch.where(warm, self.mean, mean)))
        self.variance.copy_(torch.where(warm & teaches, spread, torch.where(warm, self.variance, variance)))

    def _look_for_a_new_level(self, spike: Tensor, teaches: Tensor) -> None:
        counted = torch.where(teaches, (self.outliers + 1) * spike, self.outliers)
        found = counted >= self.patience
        self.outliers.copy_(counted * ~found)
        self.seen.mul_(~found)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, z_threshold={self.z_threshold}, max_norm={self.max_norm}"
