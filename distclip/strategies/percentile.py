"""Clip by a percentile of the norms seen so far."""

from __future__ import annotations

import math

import torch

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound, require_norm_type
from distclip.strategies._history import History, require_count, teaches
from distclip.strategies._threshold import scale_above

UNBOUNDED = 65_536
"""How many norms ``history=None`` keeps. State has a constant shape, so that a step can be rolled back."""


class Percentile(Strategy):
    """Scale the whole gradient down to a multiple of a percentile of the latest norms.

    .. math:: \\tau = \\text{multiplier} \\cdot P_q(n_{t-h+1}, …, n_t), \\qquad
        g \\leftarrow g \\cdot \\tau / (n_t + 10^{-6}) \\text{ where } n_t > \\tau

    where nₜ/1000 takes the place of 10⁻⁶ if it is less: τ may have been learned from norms that small.

    The norm of this step is appended first (as it was before clipping), then the percentile is taken,
    linear between neighbours as :func:`numpy.percentile`. AutoClip (Seetharaman, Wichern, Pardo, Le Roux,
    "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020) is
    ``Percentile(10, multiplier=1, warmup=1, history=None)``. The defaults cut rare spikes only: above
    twice what 95 % of the steps stay below.

    At the first steps, until ``warmup`` norms are there, the threshold is ``initial``. A norm of 0 leaves the
    gradient as it is and teaches nothing: it does not enter the history, which would make τ = 0 and multiply
    all gradients by 0 from then on. Neither does one that is ∞ or NaN, which is compared with the threshold
    of the norms before it.

    A level that stays is learned once it makes up more than 1 − q/100 of the history: within (1 − q/100)·h
    steps, 50 with the defaults. (For AutoClip with its unbounded history those are nine times as many steps
    as there were before, 59,000 at most.) Until then gradients are scaled to the old level, never to 0.

    Args:
        percentile: q, in [0, 100].
        multiplier: of the percentile, ≥ 0.
        history: h, how many norms are kept. ``None`` keeps 65,536, and the latest of them after that;
            sorting so many takes milliseconds on a CPU, where 1000 take 10 µs.
        warmup: how many norms the percentile needs, in [1, history].
        initial: threshold until then, ≥ 0; ∞ does not clip.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.

    Raises:
        ValueError: an argument is not in its range.

    Example:
        >>> clipper = distclip.Clipper(model, Percentile(95.0, multiplier=2.0))
        >>> autoclip = Percentile(10, multiplier=1, warmup=1, history=None)
    """

    sizes = {"history.values": "history"}  # noqa: RUF012  # never changed

    def __init__(
        self,
        percentile: float = 95.0,
        *,
        multiplier: float = 2.0,
        history: int | None = 1000,
        warmup: int = 100,
        initial: float = 10.0,
        norm_type: float | str = 2.0,
    ) -> None:
        super().__init__()
        self.percentile = require_bound("percentile", percentile)
        self.multiplier = require_bound("multiplier", multiplier)
        self.initial = require_bound("initial", initial)
        if self.percentile > 100 or math.isinf(self.multiplier):
            raise ValueError(f"{percentile=}, {multiplier=}: expected at most 100, and a finite number")
        size = UNBOUNDED if history is None else require_count("history", history)
        self.warmup = require_count("warmup", warmup)
        if warmup > size:
            raise ValueError(f"{warmup=} is more than {history=} keeps, so the warm-up would never end")
        self.norm_type = require_norm_type(norm_type)
        self.history = History(size)

    def forward(self, norms: Norms) -> Decision:
        self.history.append(norms.total, teaches(norms.total))
        learned = self.multiplier * self.history.percentile(self.percentile)
        threshold = torch.where(self.history.count >= self.warmup, learned, self.initial)
        return Scale(scale_above(norms.total, threshold, 1e-6), threshold)

    def extra_repr(self) -> str:
        return f"percentile={self.percentile}, multiplier={self.multiplier}, warmup={self.warmup}"
