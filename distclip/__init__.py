"""Gradient clipping that is right on every rank.

The norm of the whole gradient for any mixture of data, sharded, tensor, pipeline and expert
parallelism, the same number on every rank, in one small collective.
"""

import sys

from distclip import decide, hooks
from distclip._version import __version__ as __version__
from distclip.clipper import Clipper
from distclip.decide.decision import Clamp, Decision, Scale, Then
from distclip.decide.norms import Norms
from distclip.decide.report import ClipReport
from distclip.errors import DistclipError, NonFiniteError, OwnershipError, SettingsError
from distclip.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    total_grad_norm,
)
from distclip.monitor.history import History
from distclip.ownership import declare
from distclip.strategies import (
    AGC,
    SPAM,
    AdaGC,
    Chain,
    Cosine,
    GlobalNorm,
    Percentile,
    PerGroup,
    PerParameter,
    SkipSpikes,
    Strategy,
    Value,
    Warmup,
    ZClip,
)
from distclip.training.in_backward import InBackward
from distclip.training.unscaling import unscale_

# Pickles of 0.1.0 look for these modules under their old names.
sys.modules |= {f"distclip._{name}": sys.modules[f"{decide.__name__}.{name}"] for name in ("norms", "report")}

__all__ = [
    "AGC",
    "AdaGC",
    "Chain",
    "Clamp",
    "ClipReport",
    "Clipper",
    "Cosine",
    "Decision",
    "DistclipError",
    "GlobalNorm",
    "History",
    "InBackward",
    "NonFiniteError",
    "Norms",
    "OwnershipError",
    "PerGroup",
    "PerParameter",
    "Percentile",
    "SPAM",
    "Scale",
    "SettingsError",
    "SkipSpikes",
    "Strategy",
    "Then",
    "Value",
    "Warmup",
    "ZClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare",
    "get_total_norm",
    "hooks",
    "total_grad_norm",
    "unscale_",
]
