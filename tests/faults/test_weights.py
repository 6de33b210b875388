"""Micro-batches of unequal weight: the weighted mean over the window and over all ranks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests import oracle
from tests.counting import compares
from tests.harness import on_row
from tests.step.spread import OPTIMIZERS, ROWS, SCALERS, Spread, batch, built, loss_of, model, single

ROWS_OF_WEIGHTS = {name: row for name, row in ROWS.items() if name != "pipeline"}
MAX_NORM = 0.5
# Of each micro-batch of each window, on the shares of the batch. Whole windows have three.
WINDOWS: list[list[list[float]]] = [
    [[1, 3, 2, 5], [7, 2, 2, 1], [4, 0, 3, 0.5]],
    [[0, 6, 1, 1], [0, 2, 0, 8]],  # ends with last=True; nothing on share 0
    [[100, 3, 5, 2000]],
]
# Extra messages in a step: where the sum cannot travel with the norm.
ALONE = {"single": 0, "ddp": 1, "fsdp1": 0, "fsdp2": 0, "hsdp": 1, "fsdp2_tensor_parallel": 0}


def weighted_alone(shares: int) -> tuple[nn.Module, list[float]]:
    """By one process in float64, from the definition."""
    net, norms, seed = model().double(), [], 0
    opt = OPTIMIZERS["SGD"](net.parameters(), foreach=False)
    for window in WINDOWS:
        opt.zero_grad()
        total = sum(sum(weights[:shares]) for weights in window)
        for weights in window:
            x, target = batch(seed)
            seed += 1
            for share in range(shares):
                loss = loss_of(net(x.chunk(shares)[share].double()), target.chunk(shares)[share])
                (loss * weights[share] / (total or 1.0)).backward()
        norms.append(oracle.norm(oracle.dense_gradients(net.parameters())))
        for p in net.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, MAX_NORM / (norms[-1] + 1e-6))
        opt.step()
    return net, norms


KINDS: dict[str, Callable[[float], Any]] = {
    "number": float,
    "tensor": lambda w: torch.tensor(w),
    "tokens": lambda w: torch.tensor([w], dtype=torch.float64),
}


@pytest.mark.parametrize("how", ["step", "clip", "GradScaler", "deferred", "overlap", "unscale_"])
@pytest.mark.parametrize("kind", KINDS)
@on_row(ROWS_OF_WEIGHTS)
def test_weighted_mean(row: str, kind: str, how: str) -> list[float]:
    spread = built(row)
    alone, norms = weighted_alone(spread.shares)
    fused = {"fused": True} if how == "deferred" else {"foreach": False}
    if how == "deferred" and row != "single":
        return []  # SGD has no fused kernel for DTensors; DDP is in the next test
    scaler = SCALERS["GradScaler"](init_scale=2.0**8) if how in ("GradScaler", "unscale_") else None
    opt = OPTIMIZERS["SGD"](spread.groups(), **fused)
    options: dict[str, Any] = {"overlap": how == "overlap"}
    options |= {"apply": "deferred"} if how == "deferred" else {}
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM), **options)
    got, seed, extra = [], 0, []
    for window in WINDOWS:
        opt.zero_grad()
        for i, weights in enumerate(window):
            with clipper.accumulate(3, last=i == len(window) - 1) as micro:
                x, target = spread.mine(seed)
                seed += 1
                micro.backward(
                    loss_of(spread.model(x), target), scaler, weight=KINDS[kind](weights[spread.share])
                )
        with CommDebugMode() as comm:
            if how == "clip":
                report = clipper.clip()
                opt.step()
            elif how == "unscale_":
                assert scaler is not None
                distclip.unscale_(scaler, opt, clipper)
                report = clipper.clip()
                scaler.step(opt)
                scaler.update()
            else:
                report = clipper.step(opt, scaler)
        extra.append(comm.get_total_counts())
        got.append(report.total_norm.item())
        assert report.clipped.item() == (got[-1] > 0)  # the one share has no weight in one window
    assert got == pytest.approx(norms, rel=1e-5)
    want = dict(alone.named_parameters())
    for name, tensor in spread.whole().items():
        torch.testing.assert_close(tensor, want[name].detach(), rtol=0, atol=3e-6)
    once = 2 if how == "unscale_" else 1
    each = once * ROWS[row].collectives + ALONE[row]
    assert extra[1:] == [each + compares(clipper, call) for call in (2, 3)]  # the first one plans
    return got


@on_row({"ddp": ROWS["ddp"], "fsdp2": ROWS["fsdp2"]})
def test_strategies_and_settings(row: str) -> list[float]:
    """Where the sum travels beside other sums, or cannot travel at all."""
    norms, given = [], [2.0, 6.0]
    strategies: list[tuple[distclip.Strategy, dict[str, Any]]] = [
        (distclip.GlobalNorm(1e-3), {}),
        (distclip.GlobalNorm(1e-3), {"apply": "deferred"}),
        (distclip.GlobalNorm(1e-3), {"overlap": True}),
        (distclip.GlobalNorm(1e-3, norm_type=math.inf), {}),
        (distclip.PerParameter(1e-3), {}),
        (distclip.AGC(1e-3), {}),
        (distclip.Value(1e-3, measure_direction=True), {}),
        (distclip.Chain(distclip.SkipSpikes(use_loss=True), distclip.GlobalNorm(1e-3)), {}),
    ]
    for strategy, options in strategies:
        spread = built(row)
        opt = OPTIMIZERS["AdamW"](spread.groups(), fused=True)
        clipper = distclip.Clipper(spread.model, strategy, **options)
        for seed in range(2):
            with clipper.accumulate(2) as micro:
                x, target = spread.mine(seed)
                micro.backward(loss_of(spread.model(x), target), weight=given[seed] * (1 + spread.share))
        report = clipper.step(opt, loss=1.0)
        net = model().double()
        total = sum(given[seed] * (1 + share) for seed in range(2) for share in range(spread.shares))
        for seed in range(2):
            x, target = batch(seed)
            for share in range(spread.shares):
                loss = loss_of(
                    net(x.chunk(spread.shares)[share].double()), target.chunk(spread.shares)[share]
                )
                (loss * given[seed] * (1 + share) / total).backward()
        want = oracle.norm(oracle.dense_gradients(net.parameters()), clipper.strategy.norm_type)
        assert report.total_norm.item() == pytest.approx(want, rel=1e-5), strategy
        assert report.clipped.item()
        norms.append(report.total_norm.item())
    return norms


@on_row({"single": ROWS["single"], "ddp": ROWS["ddp"], "fsdp2": ROWS["fsdp2"]})
def test_nothing_to_learn_from(row: str) -> float:
    """All weights are 0, and the mean over no tokens is NaN: gradients of 0, not of NaN."""
    spread = built(row)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3), on_nonfinite="raise")
    with clipper.accumulate(1) as micro:
        x, _ = spread.mine(0)
        nothing = torch.full((len(x),), -100)
        micro.backward(F.cross_entropy(spread.model(x), nothing), weight=0)
    report = clipper.clip()
    assert not report.nonfinite.item()
    return report.total_norm.item()


@on_row({"single": ROWS["single"], "fsdp2": ROWS["fsdp2"]})
def test_a_negative_sum_is_no_step(row: str) -> bool:
    """On the device nobody looks at a weight: the norm is NaN, on all ranks alike."""
    spread = built(row)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    with clipper.accumulate(1) as micro:
        x, target = spread.mine(0)
        micro.backward(loss_of(spread.model(x), target), weight=torch.tensor(-3.0))
    report = clipper.clip()
    assert report.nonfinite.item()
    return bool(report.skipped.item())


def test_after_a_restart_and_after_an_error() -> None:
    """The mean is over the micro-batches whose gradients are there."""
    spread = single()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e9))
    with clipper.accumulate(4) as micro:
        micro.backward(micro_loss(spread, 9), weight=50.0)
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)
    spread = single()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e9))
    clipper.load_state_dict(torch.load(file))
    for seed in range(1, 4):
        try:
            with clipper.accumulate(4, last=seed == 3) as micro:
                if seed == 2:
                    raise MemoryError
                micro.backward(micro_loss(spread, seed), weight=float(seed))
        except MemoryError:
            assert seed == 2
            assert not micro.complete
    total = clipper.clip().total_norm.item()
    net = model().double()
    for seed in (1, 3):
        x, target = batch(seed)
        (loss_of(net(x.double()), target) * seed / 4).backward()
    assert total == pytest.approx(oracle.norm(oracle.dense_gradients(net.parameters())), rel=1e-5)
    with clipper.accumulate(1) as micro:  # a new window owes nothing to the old one
        micro.backward(micro_loss(spread, 5))


def micro_loss(spread: Spread, seed: int) -> Tensor:
    x, target = spread.mine(seed)
    return loss_of(spread.model(x), target)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (-1.0, ValueError, "weight=-1.0.*not negative"),
    (math.nan, ValueError, "weight=nan"),
    (math.inf, ValueError, "weight=inf"),
    ("tokens", TypeError, "weight is a str"),
    ([3, 4], TypeError, "weight is a list"),
    (torch.ones(3), ValueError, r"shape \(3,\).*mask.sum"),
    (torch.ones((), dtype=torch.complex64), ValueError, "one real number"),
]


@pytest.mark.parametrize(("weight", "error", "says"), WRONG, ids=lambda x: str(x)[:20])
def test_wrong_weights(weight: Any, error: type[Exception], says: str) -> None:
    spread = single()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    with pytest.raises(error, match=says), clipper.accumulate(2) as micro:
        micro.backward(micro_loss(spread, 0), weight=weight)
    assert all(p.grad is None for p in spread.model.parameters())


@pytest.mark.parametrize("first", [None, 2.0])
def test_some_with_and_some_without(first: float | None) -> None:
    spread = single()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    with clipper.accumulate(2) as micro:
        micro.backward(micro_loss(spread, 0), weight=first)
    with pytest.raises(ValueError, match="for all of them or for none"), clipper.accumulate(2) as micro:
        micro.backward(micro_loss(spread, 1), weight=2.0 if first is None else None)


def test_with_stages_it_is_refused() -> None:
    spread = single()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0), stages=dist.group.WORLD)
        with pytest.raises(ValueError, match="stages"), clipper.accumulate(2) as micro:
            micro.backward(micro_loss(spread, 0), weight=1.0)
    finally:
        dist.destroy_process_group()
