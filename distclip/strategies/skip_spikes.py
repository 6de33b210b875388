"""Skip the steps whose norm is far above the latest ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound, require_norm_type, state
from distclip.strategies._history import History, require_count, teaches


class SkipSpikes(Strategy):
    """Leave out optimizer steps whose norm is more than ``sigma`` standard deviations above the mean.

    .. math:: \\text{skip where } n - \\mu > \\text{sigma} \\cdot s

    with μ and s (unbiased) over the previous ``window`` norms, this one excluded. No gradient is scaled: put
    it into a ``Chain`` with a strategy that clips. What is skipped is up to the optimizer: ``clipper.step``
    obeys ``report.skipped``.

    Follows the skip-step optimizers of OLMo-core (OLMo et al., "2 OLMo 2 Furious", 2025) on the norm, with
    two differences. There a skipped norm enters the history like any other, which widens s and lets the
    next spike pass more easily; here a skipped step leaves no trace. And there the update is multiplied by
    0, so that NaN enters the optimizer's state (0·NaN); here nothing is multiplied.

    Because skipped norms are forgotten, a norm that jumps to a new level and stays there (another learning
    rate, a new data mix, a resumed run with another batch size) would be skipped for ever. So ``patience``
    spikes in a row are a new level: the next one is taken, the history is forgotten and starts anew with it.
    No more than ``patience`` steps in a row are skipped as spikes, and the ``min_history - 1`` after that are
    not judged; in a ``Chain`` with others that skip, the largest patience counts. Steps with a norm of 0, ∞
    or NaN between two skips are not counted. Five and more skips in a row are logged, once per run. (In
    OLMo-core a level is learned after about window / (sigma² + 1) skips, 4 with its defaults, since skipped
    norms enter the history. ``max_consecutive_errors`` of optax's ``apply_if_finite`` is another such bound.)
    Call :meth:`forget` at a change that you know of.

    No step is skipped before the ``min_history``-th norm, and the threshold is ∞ until then. After that, NaN
    and ∞ are spikes too (before it, they are left to ``on_nonfinite`` alone). If all previous norms are
    equal, s is 0 and any larger norm is a spike. A norm of 0 is none and teaches nothing: it does not enter
    the history.

    With ``use_loss=True`` the loss is judged in the same way beside the norm, and a step is skipped if either
    is a spike, or if the loss is not finite (then without a limit: there is no level to learn). Give it to
    :meth:`Clipper.step` (or ``clip``): the mean over the ranks that have one is what counts, so that all
    decide alike. If no rank gives one, the mean is NaN.

    Args:
        window: how many previous norms are compared with, ≥ 2.
        sigma: number of standard deviations, ≥ 0.
        min_history: number of norms, this one included, from which on steps are judged, in
            [3, window + 1]. (64 of a window of 128 is what OLMo-core does.)
        norm_type: p, one of 0.5, 1, 2, 3, ∞.
        use_loss: judge the loss too. Not with p = ∞.
        patience: how many steps are skipped in a row at most, ≥ 1.

    Raises:
        ValueError: an argument is not in its range.

    Example:
        >>> clipper = distclip.Clipper(model, Chain(SkipSpikes(), distclip.GlobalNorm(1.0)))
    """

    skips: Tensor  # [] int64, spikes so far
    skips_before: Tensor  # [] int64, those before the latest step that was taken

    patience: int = 10  # of those that 0.1.0 has pickled

    never_scales = True
    # ``skips_before`` is not: where another link of a chain skips what this one takes, the run goes on.
    through_skips = ("skips",)
    sizes = {"history.values": "window", "losses.values": "window"}  # noqa: RUF012  # never changed
    since = ("skips", "skips_before")

    def __init__(
        self,
        window: int = 128,
        sigma: float = 6.0,
        *,
        min_history: int = 64,
        norm_type: float | str = 2.0,
        use_loss: bool = False,
        patience: int = 10,
    ) -> None:
        super().__init__()
        self.history = History(require_count("window", window, least=2))
        self.uses_loss = bool(use_loss)
        if self.uses_loss:
            self.losses = History(window)
        self.sigma = require_bound("sigma", sigma)
        self.min_history = require_count("min_history", min_history, least=3)
        if min_history > window + 1:
            raise ValueError(f"{min_history=} is more than {window=} keeps, so no step would ever be judged")
        self.norm_type = require_norm_type(norm_type)
        if self.uses_loss and math.isinf(self.norm_type):
            raise ValueError("use_loss=True with norm_type=inf: the loss travels in the sum of a finite p")
        self.patience = require_count("patience", patience)
        self.register_buffer("skips", state((), 0, torch.int64))
        self.register_buffer("skips_before", state((), 0, torch.int64))

    def forward(self, norms: Norms) -> Decision:
        spike, threshold = self._judge(norms.total, self.history)
        judged, finite, learns = spike, torch.isfinite(norms.total), teaches(norms.total)
        loss = norms.loss if self.uses_loss else None
        if loss is not None:
            judged = judged | self._judge(loss, self.losses)[0]
            finite = finite & torch.isfinite(loss)
            spike = judged | ~torch.isfinite(loss)
        is_level = judged & finite & (self.skips - self.skips_before >= self.patience)
        skip = spike & ~is_level
        self.skips += skip & finite
        self.skips_before.copy_(torch.where(is_level | (learns & ~skip), self.skips, self.skips_before))
        self.history.clear_where(is_level)
        self.history.append(norms.total, learns)
        if loss is not None:
            self.losses.clear_where(is_level)
            self.losses.append(loss, learns)
        return Scale(torch.ones_like(norms.total), threshold, skip)

    def _judge(self, value: Tensor, history: History) -> tuple[Tensor, Tensor]:
        """Whether it is a spike, and the largest value that would be none."""
        mean, std = history.mean_and_std()
        judged = history.count + 1 >= self.min_history
        above = value.double() - mean
        spike = judged & ~(above <= self.sigma * std)  # NaN is one
        return spike, torch.where(judged, mean + self.sigma * std, math.inf).float()

    def forget(self) -> None:
        """Drop the history: the next ``min_history - 1`` steps are not judged."""
        self.history.clear()
        if self.uses_loss:
            self.losses.clear()
        self.skips_before.copy_(self.skips)

    def extra_repr(self) -> str:
        loss = ", use_loss=True" if self.uses_loss else ""
        return f"sigma={self.sigma}, min_history={self.min_history}{loss}"
