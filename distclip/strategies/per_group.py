"""Clip the norm of each group of parameters by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distclip.decide.decision import Decision, Scale
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._base import Strategy, listed, require_bound, require_norm_type, scale_to
from distclip.strategies._pattern import Patterns


class PerGroup(Strategy):
    """Give each group of parameters its own norm and its own threshold.

    .. math:: g_i \\leftarrow g_i \\cdot \\min(1, \\tau_G / (\\|g_G\\|_p + \\text{eps})), \\quad i \\in G

    The norms of all groups travel in the step's single collective.

    Args:
        max_norms: threshold by group. A key that is a string is a pattern on parameter names with ``*``,
            ``?`` and ``[…]`` (as :mod:`fnmatch`); an integer is the index of an optimizer's parameter
            group, for a clipper made from the optimizer. A parameter belongs to the first key that fits;
            one that fits none is measured and never clipped.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.
        eps: added to the norm before dividing.

    Raises:
        ValueError: no group is given, a threshold or ``eps`` is negative or NaN, or p is none of those. From
            the first clip: a key fits no parameter that trains.
        TypeError: a key is neither a string nor an integer.

    Example:
        >>> strategy = distclip.PerGroup({"embed.*": 0.1, "*.bias": 0.5, "*": 1.0})
    """

    _thresholds: Tensor  # [num_groups]

    def __init__(
        self, max_norms: Mapping[str | int, float], *, norm_type: float | str = 2.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if not max_norms:
            raise ValueError(f"{max_norms=}: expected at least one group")
        for key in max_norms:
            if not isinstance(key, str | int):
                raise TypeError(f"key {key!r} of max_norms: expected a name pattern or a group index")
        self.keys = tuple(max_norms)
        self.groups = (*map(str, self.keys), "(no group)")
        self.norm_type = require_norm_type(norm_type)
        self.eps = require_bound("eps", eps)
        thresholds = [require_bound(f"max_norms[{key!r}]", value) for key, value in max_norms.items()]
        # Not persistent: a setting, not state.
        self.register_buffer("_thresholds", listed([*thresholds, math.inf], torch.float32), persistent=False)

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns("PerGroup", self.keys)

    def group_of(self, parameter: ParameterInfo) -> int:
        first = self._patterns.first(parameter)
        return len(self.keys) if first is None else first

    def prepare(self, parameters: Sequence[ParameterInfo]) -> None:
        self._patterns.require_fit(parameters)

    def forward(self, norms: Norms) -> Decision:
        return Scale(scale_to(norms.slots, self._thresholds, self.eps), self._thresholds)

    def extra_repr(self) -> str:
        return ", ".join(self.groups[:-1])
