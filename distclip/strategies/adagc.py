"""Clip each parameter by a moving average of its own clipped norm."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._base import Strategy, listed, require_bound, scale_to, state
from distclip.strategies._history import require_count
from distclip.strategies._threshold import scale_above


class AdaGC(Strategy):
    """Let no parameter's norm grow faster than ``ratio`` times the average of its own clipped norms.

    .. math:: g_i \\leftarrow g_i \\cdot \\frac{\\text{ratio} \\cdot \\gamma_i}{n_i + \\text{eps}}
        \\text{ where } n_i > \\text{ratio} \\cdot \\gamma_i, \\qquad
        \\gamma_i \\leftarrow \\beta\\gamma_i + (1-\\beta) \\min(n_i, \\text{ratio} \\cdot \\gamma_i)

    Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining" (arXiv
    2502.11034). In the first ``warmup`` steps the whole gradient is clipped to ``max_norm`` instead, and
    γᵢ is the smallest clipped norm that the parameter has had.

    A norm of exactly 0 says that a parameter took no part in the step (an expert without tokens, a missing
    gradient) and leaves γᵢ as it is. (By the letter of the paper a single 0 in the warm-up makes γᵢ = 0, so
    that the parameter is multiplied by 0 for ever.) A parameter that has no γᵢ after the warm-up, because it
    came later or had no gradient yet, starts with ``min(n_i, max_norm)`` and is clipped to that. A step whose
    norm is ∞ or NaN changes no state.

    A norm that grows by a factor f and stays there is learned in ln f / ln(1 + (1 − β)(ratio − 1)) steps:
    with the defaults 1,733 for twice and 5,757 for ten times the norm. (With ``ratio=1`` or ``beta=1`` never:
    γᵢ only falls then, or stays.) Until then gradients are scaled to the old level, never to 0.

    Args:
        ratio: how far above its average a norm may be, ≥ 1.
        beta: smoothing factor of the averages, in [0, 1].
        eps: added to the norm before dividing; where the threshold is learned, 10⁻³ of the norm at most.
        warmup: number of steps with the global clip, ≥ 0.
        max_norm: threshold of the global clip, ≥ 0.

    The state is one number per parameter, saved by parameter name: it can be loaded before the first clip,
    and where parameters were added or removed, which warns.

    Raises:
        ValueError: an argument is not in its range.

    Example:
        >>> clipper = distclip.Clipper(model, AdaGC(1.04, beta=0.99))
    """

    per_parameter = True
    step: Tensor  # [] int64
    average: Tensor  # [num_parameters] float64: γ, +inf where there is none yet

    def __init__(
        self,
        ratio: float = 1.04,
        beta: float = 0.99,
        *,
        eps: float = 1e-6,
        warmup: int = 100,
        max_norm: float = 1.0,
    ) -> None:
        super().__init__()
        self.ratio = require_bound("ratio", ratio)
        self.beta = require_bound("beta", beta)
        if not 1 <= self.ratio < math.inf or self.beta > 1:
            raise ValueError(f"{ratio=}, {beta=}: expected a finite ratio of at least 1, and beta at most 1")
        self.eps = require_bound("eps", eps)
        self.warmup = require_count("warmup", warmup, least=0)
        self.max_norm = require_bound("max_norm", max_norm)
        self._names: tuple[str, ...] | None = None  # of the parameters, in the order of the slots
        self._loaded: dict[str, float] | None = None  # state that came before the names
        self.register_buffer("step", state((), 0, torch.int64))
        # Not persistent: saved with the names, see get_extra_state.
        self.register_buffer("average", state((0,), 0, torch.float64), persistent=False)

    def prepare(self, parameters: Sequence[ParameterInfo]) -> None:
        known = self._by_name()
        self._names = _told_apart(p.name for p in parameters)
        self.average = state((len(parameters),), math.inf, torch.float64).to(self.average.device)
        if self._loaded is not None:
            known, self._loaded = self._loaded, None
            self._warn_of_differences(known)
        self._take(known)

    def forward(self, norms: Norms) -> Decision:
        n = norms.slots.double()
        if n.numel() != self.average.numel():
            raise RuntimeError(
                f"AdaGC got norms of {n.numel()} parameters and was prepared for {self.average.numel()}: "
                "call prepare(parameters) first, as Clipper does"
            )
        warming = self.step < self.warmup
        together = scale_to(norms.total, self.max_norm, self.eps)
        bound = torch.where(torch.isinf(self.average), self.max_norm, self.ratio * self.average)
        alone = scale_above(n, bound, self.eps)

        clipped = torch.where(warming, n * together, torch.minimum(n, bound))
        moved = torch.where(
            warming | torch.isinf(self.average),
            torch.minimum(self.average, clipped),
            self.beta * self.average + (1 - self.beta) * clipped,
        )
        self.average.copy_(torch.where(clipped == 0, self.average, moved))  # also where max_norm=0
        self.step += 1
        return Scale(
            torch.where(warming, together, alone.float()),
            threshold=torch.where(warming, self.max_norm, bound.float()),
        )

    def get_extra_state(self) -> dict[str, Any]:
        # Lists of numbers, no tensors: torch.distributed.checkpoint loads a tensor only into one of its size,
        # which a new AdaGC does not have yet, and one with other parameters never has.
        averages = self._by_name() if self._loaded is None else self._loaded
        return {"names": list(averages), "average": list(averages.values())}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        loaded = dict(zip(state["names"], map(float, state["average"]), strict=True))
        if self._names is None:
            self._loaded = loaded
        else:
            self._warn_of_differences(loaded)
            self.average.fill_(math.inf)
            self._take(loaded)

    def _by_name(self) -> dict[str, float]:
        averages = self.average.to("cpu")  # one transfer, where there is anything to transfer
        return dict(zip(self._names or (), map(float, averages), strict=True))

    def _take(self, known: dict[str, float]) -> None:
        if known and self._names:
            values = [known.get(name, math.inf) for name in self._names]
            self.average.copy_(listed(values, torch.float64))

    def _warn_of_differences(self, loaded: dict[str, float]) -> None:
        names = set(self._names or ())
        added, removed = sorted(names - set(loaded)), sorted(set(loaded) - names)
        changes = []
        if added:
            changes.append(f"has no average for {_listed(added)}: new here, to start with the next norm")
        if removed:
            changes.append(f"has one for {_listed(removed)}: not clipped here, dropped")
        if changes:
            warnings.warn(f"the loaded state of AdaGC {'; it '.join(changes)}", stacklevel=2)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, beta={self.beta}, warmup={self.warmup}, max_norm={self.max_norm}"


def _told_apart(names: Iterable[str]) -> tuple[str, ...]:
    """Pipeline stages may use the same names: the second to come is ``name#2``."""
    seen: Counter[str] = Counter()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(apart)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
