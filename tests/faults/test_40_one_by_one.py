"""``for o in optimizers: clipper.step(o, scaler)``: one decision for all, whoever steps first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests import oracle
from tests.harness import on_row
from tests.step.spread import ROWS, Spread, built, loss_of, model, single

MAX_NORM = 0.5


def optimizers(spread: Spread, kind: str) -> list[torch.optim.Optimizer]:
    """One for each third of the parameters."""
    parts = [list(spread.model.parameters())[i::3] for i in range(3)]
    if kind == "fused":
        return [torch.optim.AdamW(part, 0.01, eps=1e-3, fused=True) for part in parts]
    return [torch.optim.SGD(part, 0.1, momentum=0.9, foreach=False) for part in parts]


def trained(row: str, kind: str, one_by_one: str, bad: tuple[Any, ...], **options: Any) -> list[Any]:
    """What the parameters are in the end, the norms, and the scales."""
    spread = built(row)
    opts = optimizers(spread, kind)
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2) if "scaler" in one_by_one else None
    strategy = distclip.Chain(distclip.ZClip(warmup=2, max_norm=MAX_NORM), distclip.GlobalNorm(10.0))
    clipper = distclip.Clipper(spread.model, strategy, **options)
    got: list[Any] = []
    for seed, value in enumerate(bad):
        for opt in opts:
            opt.zero_grad()
        spread.backward(seed, scaler.scale if scaler is not None else lambda loss: loss, value)
        if "unscaled before" in one_by_one:
            assert scaler is not None
            for opt in opts:
                scaler.unscale_(opt)
        if one_by_one.startswith("all"):
            report = clipper.step(opts, scaler)
        else:
            last = len(opts) - 1
            for i, opt in enumerate(opts):
                with CommDebugMode() as comm:
                    update = "updated last" not in one_by_one or i == last
                    report = clipper.step(opt, scaler, update=update)
                assert i == 0 or comm.get_total_counts() == 0
                if "zeroed" in one_by_one:
                    opt.zero_grad()
        got.append((report.total_norm.item(), report.skipped.item(), scaler and scaler.get_scale()))
    assert clipper.steps == len(bad)
    return [got, spread.whole()]


WAYS = ["plain", "zeroed", "scaler", "scaler, zeroed", "scaler, updated last"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@on_row({name: ROWS[name] for name in ("single", "ddp", "fsdp2")})
def test_40_as_all_at_once(row: str, kind: str, way: str) -> None:
    bad = (None, None, math.inf, None)
    both = "all, scaler" if "scaler" in way else "all"
    (got, one), (want, other) = trained(row, kind, way, bad), trained(row, kind, both, bad)
    assert str(got) == str(want)
    assert [skipped for _, skipped, _ in got] == [False, False, True, False]
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"apply": "deferred"}, {"overlap": True}, {"on_nonfinite": "zero"}], ids=str
)
@pytest.mark.parametrize("way", ["plain", "scaler"])
def test_40_settings(way: str, options: dict[str, Any]) -> None:
    both = "all, scaler" if "scaler" in way else "all"
    (got, one), (want, other) = (trained("single", "fused", w, (None,) * 3, **options) for w in (way, both))
    assert str(got) == str(want)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_40_unscaled_before() -> None:
    got, want = (
        trained("single", "foreach", f"{w}, scaler, unscaled before", (None,) * 3) for w in ("one", "all")
    )
    assert str(got[0]) == str(want[0])


def backward(net: nn.Module, seed: int, scaler: GradScaler | None = None) -> float:
    x, target = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    loss = loss_of(net(x), target)
    (loss if scaler is None else scaler.scale(loss)).backward()
    scale = 1.0 if scaler is None else scaler.get_scale()
    return oracle.norm(oracle.dense_gradients(net.parameters())) / scale


@pytest.mark.parametrize("scaled", [False, True])
def test_40_in_turn_is_no_loop(scaled: bool) -> None:
    """New gradients for each optimizer, as in a GAN with one clipper: each is a step of its own."""
    net, scaler = model(), GradScaler("cpu", init_scale=64.0) if scaled else None
    opts = [torch.optim.SGD(part.parameters(), 0.01) for part in net]
    clipper = distclip.Clipper(net, distclip.GlobalNorm(MAX_NORM))
    for seed in range(6):
        if seed < 4:
            net.zero_grad()  # afterwards they go on adding up
        want = backward(net, seed, scaler)
        if seed < 4:
            assert clipper.step(opts[seed % 2], scaler).total_norm.item() == pytest.approx(want, rel=1e-5)
        else:
            clipper.step(opts[seed % 2], scaler)
        assert clipper.steps == seed + 1


def test_40_another_scaler() -> None:
    net, scaler = model(), GradScaler("cpu", init_scale=64.0)
    opts = [torch.optim.SGD(part.parameters(), 0.01) for part in net]
    clipper = distclip.Clipper(net, distclip.GlobalNorm(MAX_NORM))
    backward(net, 0, scaler)
    clipper.step(opts[0], scaler)
    before: list[Tensor] = [p.detach().clone() for p in net.parameters()]
    for other in (None, GradScaler("cpu", init_scale=64.0), GradScaler("cpu", enabled=False)):
        with pytest.raises(ValueError, match=r"clipper\.step\(\[first, second\], scaler\)"):
            clipper.step(opts[1], other)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_40_optimizers_that_hold_some_only() -> None:
    """What no optimizer holds, and what has no gradient, changes nothing."""
    spread = single()
    opt = torch.optim.SGD(list(spread.model.parameters())[:2], 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM))
    for seed in range(4):
        spread.model.zero_grad()
        spread.backward(seed)
        want = oracle.norm(oracle.dense_gradients(spread.model.parameters()))
        assert clipper.step(opt).total_norm.item() == pytest.approx(want, rel=1e-5)
