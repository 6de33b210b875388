"""AGC beside timm's. Its one file is read: `import timm` needs a torchvision built for this torch, so
launch/setup.sh puts it where nothing finds it by accident."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from tests.parity.steps import agree


def timm_adaptive_clip_grad() -> Callable[..., None]:
    path = Path(sys.prefix, "apart/timm/utils/agc.py")
    spec = importlib.util.spec_from_file_location("timm_agc", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Weights of 1, 2 and 4 dims; some units that start as zeros, so that the floor counts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 3)
    )
    with torch.no_grad():
        model[3].weight[1:3] = 0
        model[4].bias.zero_()
    return model


def gradients(step: int) -> list[Tensor]:
    """Around what AGC tolerates, so that some units are clipped and others are not; one of zeros."""
    generator = torch.Generator().manual_seed(step)
    grads = [
        (p.detach().abs().mean() + 1e-4)
        * 10 ** (4 * torch.rand((), generator=generator) - 3.5)
        * torch.randn(p.shape, generator=generator)
        for p in network().parameters()
    ]
    grads[0][0] = 0
    return grads


@pytest.mark.parametrize("options", [(0.01, 1e-3), (0.1, 0.5)], ids=["defaults", "other settings"])
def test_every_step_as_timm(options: tuple[float, float]) -> None:
    clipping, eps = options
    reference, theirs, ours = timm_adaptive_clip_grad(), network(), network()
    clipper = distclip.Clipper(ours, distclip.AGC(clipping, eps=eps, exclude=()))
    changed, whole = 0, 0
    for step in range(60):
        for model in (ours, theirs):
            for p, g in zip(model.parameters(), gradients(step), strict=True):
                p.grad = g.clone()
        reference(theirs.parameters(), clip_factor=clipping, eps=eps)
        clipper.clip()
        clipped: list[Any] = [p.grad for p in ours.parameters()]
        assert agree(clipped, [p.grad for p in theirs.parameters()])
        for before, after in zip(gradients(step), clipped, strict=True):
            same = (
                (before == after).flatten(1).all(1) if before.dim() > 1 else (before == after).all().view(1)
            )
            changed += int((~same).sum())
            whole += int(same.sum())
    assert changed > 200
    assert whole > 200
