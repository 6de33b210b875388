"""distclip's own time beside a script's call, which must leave the script's gradients as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distclip.audit import comparison


@pytest.mark.parametrize("most", [0, 1 << 20], ids=["too large to copy", "copied"])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_nothing_is_written(value: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_MOST", most)
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.tensor([value, 2.0, 3.0, 4.0, 5.0])
    before, version = parameter.grad.clone(), parameter.grad._version
    seconds = comparison.seconds_of_distclip([parameter], 0.1, 2.0)
    assert seconds is not None
    assert seconds > 0
    assert torch.equal(parameter.grad.nan_to_num(7.0), before.nan_to_num(7.0))
    assert parameter.grad._version == version


@pytest.mark.parametrize("max_norm", [0.0, -1.0])
def test_no_threshold(max_norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.ones(5)
    assert comparison.seconds_of_distclip([parameter], max_norm, 2.0) is None
