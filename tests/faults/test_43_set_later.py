"""43: settings that are changed after the first clip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distclip


def test_another_strategy_is_refused() -> None:
    clipper = distclip.Clipper(nn.Linear(2, 2), distclip.GlobalNorm(1.0))
    with pytest.raises(AttributeError, match=r"made with \(GlobalNorm.*make a new"):
        clipper.strategy = distclip.Value(1.0)


def test_thresholds_are_not_set_but_scheduled() -> None:
    clipper = distclip.Clipper(nn.Linear(2, 2), distclip.GlobalNorm(1.0))
    with pytest.raises(AttributeError, match="max_norm"):
        clipper.strategy.max_norm = 0.5


def test_a_policy_holds_from_the_next_clip() -> None:
    p = nn.Parameter(torch.zeros(4))
    clipper = distclip.Clipper(p, distclip.GlobalNorm(1.0))
    p.grad = torch.full((4,), torch.nan)
    assert clipper.clip().skipped
    clipper.on_nonfinite = "raise"
    with pytest.raises(distclip.NonFiniteError):
        clipper.clip()
