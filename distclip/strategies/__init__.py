"""Clipping algorithms: norms in, decision out; no ranks, no parameters.

In come ``Norms``, out goes a ``Decision``; what is learned lies in buffers. Pure: imports ``decide`` alone,
nothing of ``torch.distributed``, and never waits for the device.
"""

from distclip.strategies._base import Strategy
from distclip.strategies.adagc import AdaGC
from distclip.strategies.agc import AGC
from distclip.strategies.chain import Chain
from distclip.strategies.global_norm import GlobalNorm
from distclip.strategies.per_group import PerGroup
from distclip.strategies.per_parameter import PerParameter
from distclip.strategies.percentile import Percentile
from distclip.strategies.schedules import Cosine, Warmup
from distclip.strategies.skip_spikes import SkipSpikes
from distclip.strategies.spam import SPAM
from distclip.strategies.value import Value
from distclip.strategies.zclip import ZClip

__all__ = [
    "AGC",
    "SPAM",
    "AdaGC",
    "Chain",
    "Cosine",
    "GlobalNorm",
    "PerGroup",
    "PerParameter",
    "Percentile",
    "SkipSpikes",
    "Strategy",
    "Value",
    "Warmup",
    "ZClip",
]
