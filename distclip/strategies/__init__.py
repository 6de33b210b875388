"""Clipping algorithms: norms in, decision out; no ranks, no parameters."""

from distclip.strategies._base import Strategy
from distclip.strategies.global_norm import GlobalNorm
from distclip.strategies.per_group import PerGroup
from distclip.strategies.per_parameter import PerParameter
from distclip.strategies.value import Value

__all__ = ["GlobalNorm", "PerGroup", "PerParameter", "Strategy", "Value"]
