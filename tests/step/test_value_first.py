"""A Chain with a Value before its end, at the clipper: report, loss scale, collectives and bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import Chain, GlobalNorm, Percentile, SkipSpikes, Value, ZClip
from tests import oracle
from tests.counting import count_host_syncs
from tests.harness import on_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9}


def parameters(dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for shape in ((7, 5), (3,), (), (2, 0), (600,)):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (scale * torch.randn(shape, generator=generator, dtype=torch.float32)).to(dtype)
        made.append(p)
    return made


def expected(gradients: list[Tensor], bound: float, most: float, p: float) -> list[Tensor]:
    clamped = [g * (bound / g.abs().clamp_min(bound)) for g in gradients]
    return [g * min(1.0, most / (oracle.norm(clamped, p) + 1e-6)) for g in clamped]


def dense(ps: list[nn.Parameter]) -> list[Tensor]:
    return [g for p in ps if (g := oracle.dense(p.grad)) is not None]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_before_and_after(dtype: torch.dtype, p: float) -> None:
    ps = parameters(dtype)
    before = dense(ps)
    most = 0.5 * oracle.norm([g * (0.7 / g.abs().clamp_min(0.7)) for g in before], p)
    want = expected(before, 0.7, most, p)
    with count_host_syncs() as syncs:
        report = distclip.Clipper(ps, Chain(Value(0.7), GlobalNorm(most, p))).clip()
    assert syncs.count <= 1
    for got, right in zip(dense(ps), want, strict=True):
        torch.testing.assert_close(got, right, rtol=TOLERANCE.get(dtype, 3e-6), atol=1e-9)
    assert report.total_norm.item() == pytest.approx(oracle.norm(before, p), rel=1e-6)
    assert report.clipped_norm.item() == pytest.approx(oracle.norm(want, p), rel=1e-5)
    assert report.coefficient.item() == pytest.approx(oracle.norm(want, p) / oracle.norm(before, p), rel=1e-5)
    assert report.threshold.item() == pytest.approx(most)
    assert report.clipped


@pytest.mark.parametrize("bound", [1e3, math.inf])
def test_below_both_nothing_changes(bound: float) -> None:
    ps = parameters(torch.float32)
    before = [p.grad.clone() for p in ps if p.grad is not None]
    report = distclip.Clipper(ps, Chain(Value(bound), GlobalNorm(1e3), Percentile(initial=1e3))).clip()
    assert not report.clipped
    assert report.clipped_norm == report.total_norm
    assert report.coefficient == 1
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, before, strict=True))  # type: ignore[arg-type]


def test_only_elements_are_too_large() -> None:
    ps = parameters(torch.float32)
    before = dense(ps)
    report = distclip.Clipper(ps, Chain(Value(0.7), GlobalNorm(1e3))).clip()
    assert report.clipped
    want = [g * (0.7 / g.abs().clamp_min(0.7)) for g in before]
    assert report.clipped_norm.item() == pytest.approx(oracle.norm(want), rel=1e-6)
    for got, right in zip(dense(ps), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scale", [4.0, 1024.0])
@pytest.mark.parametrize("unscaled", [False, True])
def test_with_a_loss_scale(scale: float, unscaled: bool) -> None:
    ps = parameters(torch.float32, scale)
    want = expected([g / scale for g in dense(ps)], 0.7, 2.0, 2.0)
    optimizer = torch.optim.SGD(ps, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    if unscaled:
        scaler.unscale_(optimizer)
    report = distclip.Clipper(ps, Chain(Value(0.7), GlobalNorm(2.0))).step(optimizer, scaler)
    for got, right in zip(dense(ps), want, strict=True):
        torch.testing.assert_close(got, right, rtol=3e-6, atol=1e-9)
    assert report.clipped_norm.item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    ps = parameters(torch.float32)
    assert ps[0].grad is not None
    ps[0].grad[0, 0] = bad
    clipper = distclip.Clipper(ps, Chain(Value(0.7), ZClip(warmup=1), SkipSpikes()))
    state = {k: v.clone() for k, v in clipper.strategy.named_buffers()}
    report = clipper.clip()
    assert report.nonfinite
    assert report.skipped
    assert all(torch.equal(v, state[k]) for k, v in clipper.strategy.named_buffers())


@pytest.mark.parametrize("arguments", [{"overlap": True}, {"apply": "deferred"}], ids=str)
def test_what_it_cannot_be_combined_with(arguments: dict[str, Any]) -> None:
    ps = parameters(torch.float32)
    optimizer = torch.optim.SGD(ps, lr=0.1, fused=True)
    with pytest.raises(ValueError, match=r"measures after backward|one coefficient for all"):
        distclip.Clipper(ps, Chain(Value(0.7), GlobalNorm(2.0)), **arguments).step(optimizer)


@on_ranks(2)
def test_one_collective_on_shards(rank: int) -> float:
    whole = torch.arange(1.0, 9.0) - 4.5
    p = nn.Parameter(torch.zeros(4))
    distclip.declare(p, sharded_over=dist.group.WORLD)
    p.grad = whole[4 * rank : 4 * rank + 4].clone()
    clipper = distclip.Clipper([p], Chain(Value(2.0), SkipSpikes(), GlobalNorm(3.0, eps=0.0)))
    _ = clipper.plan
    with CommDebugMode() as comm:
        report = clipper.clip()
    assert comm.get_total_counts() == 1
    clamped = whole.double().clamp(-2, 2)
    want = clamped * 3.0 / clamped.norm()
    torch.testing.assert_close(p.grad.double(), want[4 * rank : 4 * rank + 4], rtol=1e-6, atol=0.0)
    assert report.total_norm.item() == pytest.approx(whole.norm().item(), rel=1e-6)
    return report.clipped_norm.item()


def in_the_middle(gradients: list[Tensor], most: float, bound: float, least: float, p: float) -> list[Tensor]:
    """One link after the other, in float64."""
    whole = [g * min(1.0, most / (oracle.norm(gradients, p) + 1e-6)) for g in gradients]
    return expected(whole, bound, least, p)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_in_the_middle(dtype: torch.dtype, p: float) -> None:
    """What it leaves depends on the norm of this step."""
    ps = parameters(dtype)
    before = dense(ps)
    norm = oracle.norm(before, p)
    scaled = [g / 2 for g in before]
    bound = 0.5 * max(float(g.abs().max()) for g in scaled if g.numel())
    least = 0.5 * oracle.norm([g * (bound / g.abs().clamp_min(bound)) for g in scaled], p)
    want = in_the_middle(before, norm / 2, bound, least, p)
    chain = Chain(GlobalNorm(norm / 2, p), Value(bound), GlobalNorm(least, p))
    with count_host_syncs() as syncs:
        report = distclip.Clipper(ps, chain).clip()
    assert syncs.count <= 1
    for got, right in zip(dense(ps), want, strict=True):
        torch.testing.assert_close(got, right, rtol=TOLERANCE.get(dtype, 1e-5), atol=1e-9)
    assert report.total_norm.item() == pytest.approx(norm, rel=1e-6)
    assert report.clipped_norm.item() == pytest.approx(oracle.norm(want, p), rel=1e-5)


@pytest.mark.parametrize("scale", [None, 1024.0])
@on_ranks(2)
def test_a_second_collective_on_shards(rank: int, scale: float | None) -> float:
    whole = torch.arange(1.0, 9.0) - 4.5
    p = nn.Parameter(torch.zeros(4))
    distclip.declare(p, sharded_over=dist.group.WORLD)
    p.grad = whole[4 * rank : 4 * rank + 4] * (scale or 1.0)
    chain = Chain(GlobalNorm(4.0, eps=0.0), Value(1.0), GlobalNorm(1.5, eps=0.0))
    clipper = distclip.Clipper([p], chain)
    _ = clipper.plan
    optimizer, scaler = torch.optim.SGD([p], lr=0.0), None
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
    with CommDebugMode() as comm:
        report = clipper.step(optimizer, scaler)
    assert comm.get_total_counts() == 2
    want = in_the_middle([whole.double()], 4.0, 1.0, 1.5, 2.0)[0]
    torch.testing.assert_close(p.grad.double(), want[4 * rank : 4 * rank + 4], rtol=1e-5, atol=0.0)
    assert report.total_norm.item() == pytest.approx(whole.norm().item(), rel=1e-6)
    return report.clipped_norm.item()


def test_not_with_overlap_in_the_middle() -> None:
    with pytest.raises(ValueError, match="measures after backward"):
        distclip.Clipper(
            parameters(torch.float32), Chain(GlobalNorm(1.0), Value(0.7), GlobalNorm(2.0)), overlap=True
        )
