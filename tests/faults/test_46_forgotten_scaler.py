"""46: the loss is scaled, and the clipper is not told: a hint in the log after a few steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import distclip

STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "GlobalNorm": lambda: distclip.GlobalNorm(1.0),
    "Value": lambda: distclip.Value(0.1),
    "PerParameter": lambda: distclip.PerParameter(1.0),
    "PerGroup": lambda: distclip.PerGroup({"*weight": 1.0, "*bias": 1.0}),
    "AGC": lambda: distclip.AGC(0.01),
    "ZClip": lambda: distclip.ZClip(warmup=50),
    "AdaGC": lambda: distclip.AdaGC(warmup=50),
    "Percentile": lambda: distclip.Percentile(initial=2.0),
    "Chain": lambda: distclip.Chain(distclip.SkipSpikes(), distclip.GlobalNorm(1.0)),
}


def train(
    strategy: distclip.Strategy, scale: float, way: str, steps: int = 12, size: float = 1.0, **options: Any
) -> None:
    """``size``: norms of the order of this, unscaled."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), 1e-9)
    scaler = GradScaler("cpu", init_scale=scale)
    clipper = distclip.Clipper(model, strategy, **options)
    for step in range(steps):
        opt.zero_grad()
        scaler.scale(model(torch.full((2, 4), size * (1 + 0.1 * step))).mean()).backward()
        if way == "right":
            clipper.step(opt, scaler)
            continue
        if way == "right, one scaler for all":
            clipper.step(opt, scaler, update=step % 2 == 1)
            if step % 2 == 0:
                scaler.update()
            continue
        if way == "right, unscaled before":
            scaler.unscale_(opt)
        if way == "step without":
            clipper.step(opt)
            continue
        clipper.clip()
        if way == "clip, then opt.step":
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()


@pytest.mark.parametrize("scale", [64.0, 65536.0])
@pytest.mark.parametrize("way", ["clip", "clip, then opt.step", "step without"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_46_a_hint(name: str, way: str, scale: float, caplog: pytest.LogCaptureFixture) -> None:
    train(STRATEGIES[name](), scale, way, steps=40)
    said = [r.getMessage() for r in caplog.records if "scaler" in r.getMessage()]
    assert len(said) == 1
    assert "clipper.step(optimizer, scaler), or scaler.unscale_(optimizer) before clipper.clip()" in said[0]


@pytest.mark.parametrize("overlap", [False, True])
def test_46_overlap(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    train(distclip.GlobalNorm(1.0), 1024.0, "clip", overlap=overlap)
    assert "scaler.unscale_" in caplog.text


@pytest.mark.parametrize("way", ["right", "right, unscaled before"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_46_silent_where_it_is_right(name: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Clipped in every step too."""
    train(STRATEGIES[name](), 1024.0, way, size=20.0)
    assert not caplog.records


def test_46_silent_without_a_scaler(caplog: pytest.LogCaptureFixture) -> None:
    """A low threshold is no mistake, and a scaler that has scaled nothing, or is off, tells nothing."""
    scalers = [GradScaler("cpu"), GradScaler("cpu", enabled=False)]
    scalers[1].scale(torch.ones(()))
    parameter = nn.Parameter(torch.zeros(3))
    clipper = distclip.Clipper([parameter], distclip.GlobalNorm(0.1))
    for step in range(30):
        parameter.grad = torch.full((3,), 1.0 + 0.1 * step)
        clipper.clip()
    assert not caplog.records


def test_46_silent_of_what_nobody_holds(caplog: pytest.LogCaptureFixture) -> None:
    """A scaler of a training that is over, which waits in a cycle for the garbage collector."""
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.myself = scaler  # type: ignore[attr-defined]
    gc.disable()
    try:
        del scaler
        train(distclip.GlobalNorm(0.1), 1.0, "right")
    finally:
        gc.enable()
    assert not caplog.records
