"""Clamp gradient elements that are spikes against the optimizer's second moment."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from distclip.decide.decision import Clamp, Decision
from distclip.decide.norms import Norms
from distclip.strategies._base import Strategy, require_bound
from distclip.torch_private.dtensor import local_of


class SPAM(Strategy):
    """Spike-aware clipping: an element whose square is more than θ times its running mean is cut to that.

    .. math:: g \\leftarrow \\text{sign}(g) \\sqrt{\\theta v} \\text{ where } g^2 > \\theta v

    v is the second moment that Adam keeps, ``exp_avg_sq``, as it is before this step. Huang et al., "SPAM:
    Spike-aware Adam with momentum reset" (arXiv 2501.06842), section on spike-aware clipping; the reset of
    the moments is the optimizer's business and not done here.

    Elements whose v is 0 are left alone (the first step, embeddings not seen yet): by the formula they would
    be 0 for ever. The moment lies where the gradient does, so no rank needs another; the one collective of a
    step is for the reported norm and the decision on NaN and ∞. What norm is left is not known:
    ``report.clipped_norm`` is NaN, and ``report.clipped`` says that the gradients were looked at.

    Args:
        optimizer: Adam or AdamW (or another that keeps ``exp_avg_sq``), not owned.
        threshold: θ, > 0; the paper's is 5000.

    Raises:
        ValueError: ``threshold`` is not positive. From the clip: the optimizer has stepped and keeps no
            ``exp_avg_sq``, or is gone.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> clipper = distclip.Clipper(model, distclip.SPAM(optimizer))
    """

    by_element = True

    def __init__(self, optimizer: torch.optim.Optimizer, *, threshold: float = 5000.0) -> None:
        super().__init__()
        if require_bound("threshold", threshold) == 0:
            raise ValueError(f"{threshold=}: expected a positive number")
        self.threshold = float(threshold)
        self._optimizer = weakref.ref(optimizer)

    def forward(self, norms: Norms) -> Decision:
        return Clamp(torch.full_like(norms.total, math.sqrt(self.threshold)), unit=self._root_of_moment)

    def _root_of_moment(self, parameter: Tensor) -> Tensor | None:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ValueError("the optimizer that SPAM was made with is gone: make it with the one in use")
        state = optimizer.state.get(parameter)
        if not state:
            return None  # not stepped yet
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"{type(optimizer).__name__} keeps no exp_avg_sq, which SPAM needs: use Adam or AdamW"
            )
        moment: Tensor = state["exp_avg_sq"]
        return local_of(moment).sqrt()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
