"""45: a micro-batch that raises and is caught does not count, wherever it raised, and on whichever ranks."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from tests import oracle
from tests.harness import on_ranks, on_row
from tests.step.spread import ROWS, Spread, batch, built, loss_of, model

STEPS = 4


class Caught(Exception):
    pass


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise Caught


def loss(spread: Spread, seed: int, *, broken: bool = False) -> Tensor:
    """``broken``: the backward pass raises when half of the model has its gradients."""
    x, target = spread.mine(seed)
    if not broken:
        return loss_of(spread.model(x), target)
    handle = spread.model.get_submodule(
        "module.1" if hasattr(spread.model, "module") else "1"
    ).register_forward_pre_hook(lambda m, args: (_Raise.apply(args[0]),))
    try:
        return loss_of(spread.model(x), target)
    finally:
        handle.remove()


Fail = Callable[[Spread, int, Any], None]


def before_forward(spread: Spread, seed: int, micro: Any) -> None:
    raise Caught


def before_backward(spread: Spread, seed: int, micro: Any) -> None:
    with torch.no_grad():
        loss(spread, seed)
    raise Caught


def in_loss(spread: Spread, seed: int, micro: Any) -> None:
    micro.backward("no loss")


def caught_inside(spread: Spread, seed: int, micro: Any) -> None:
    """``continue`` in the block, say."""


def after_backward(spread: Spread, seed: int, micro: Any) -> None:
    micro.backward(loss(spread, seed))
    raise Caught


FAILURES: dict[str, Fail] = {
    f.__name__: f for f in (before_forward, before_backward, in_loss, caught_inside, after_backward)
}


def want(windows: list[list[list[int]]], shares: int) -> list[float]:
    """By window, the norm of the mean over ranks of the mean over each rank's own micro-batches."""
    norms = []
    for window in windows:
        net = model().double()
        for share, seeds in enumerate(window):
            for seed in seeds:
                x, target = (t.chunk(shares)[share] for t in batch(seed))
                (loss_of(net(x.double()), target) / len(seeds) / shares).backward()
        norms.append(oracle.norm(oracle.dense_gradients(net.parameters())))
    return norms


def run_window(
    spread: Spread, clipper: distclip.Clipper, fails: dict[int, Fail], first: int = 0, last: bool = False
) -> list[int]:
    """The seeds that count. Goes on until the window is complete."""
    done, seed = [], first
    while True:
        micro: Any = None
        try:
            with clipper.accumulate(STEPS, last=last and seed == first + STEPS - 1) as micro:
                if seed - first in fails:
                    fails[seed - first](spread, seed, micro)
                else:
                    micro.backward(loss(spread, seed))
        except (Caught, TypeError):
            pass
        if micro.done:
            done.append(seed)
        seed += 1
        if micro.complete:
            return done


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1, 2), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("how", FAILURES)
@on_row({k: r for k, r in ROWS.items() if k not in ("pipeline", "hsdp", "fsdp2_tensor_parallel")})
def test_45_on_every_rank(row: str, how: str, places: tuple[int, ...]) -> list[float]:
    spread = built(row)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e9), on_nonfinite="raise")
    norms, seeds = [], []
    for fails in (dict.fromkeys(places, FAILURES[how]), {}):
        spread.model.zero_grad()
        done = run_window(spread, clipper, fails, first=10 * len(norms))
        seeds.append([done] * spread.shares)
        norms.append(clipper.clip().total_norm.item())
    assert norms == pytest.approx(want(seeds, spread.shares), rel=1e-5)
    if how != "after_backward":
        # Only where the last one failed another takes its place.
        lost = len([i for i in places if i < 3])
        assert len(seeds[0][0]) == STEPS - lost
    return norms


@pytest.mark.parametrize("places", [(0,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("how", FAILURES)
@on_ranks(2)
def test_45_on_one_rank(rank: int, how: str, places: tuple[int, ...]) -> list[float]:
    """Of DDP, whose ranks do not meet before the last: no rank waits, and all clip by one norm."""
    spread = built("ddp")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    norms, windows = [], []
    for fails in ({i: FAILURES[how] for i in places if rank}, {}):
        spread.model.zero_grad()
        seeds: list[Any] = [None, None]
        dist.all_gather_object(seeds, run_window(spread, clipper, fails, first=10 * len(norms)))
        windows.append(seeds)
        norms.append(clipper.clip().total_norm.item())
        assert oracle.norm(oracle.dense_gradients(spread.model.parameters())) == pytest.approx(1e-3, rel=1e-4)
    assert norms == pytest.approx(want(windows, 2), rel=1e-5)
    return norms


# --- half a backward pass --------------------------------------------------------------------------------

ROWS_OF_HALVES = {k: ROWS[k] for k in ("single", "ddp")}


def half(spread: Spread, seed: int, micro: Any) -> None:
    micro.backward(loss(spread, seed, broken=True))


def half_caught_inside(spread: Spread, seed: int, micro: Any) -> None:
    with pytest.raises(Caught):
        half(spread, seed, micro)


def half_and_zeroed(spread: Spread, seed: int, micro: Any) -> None:
    try:
        half(spread, seed, micro)
    finally:
        spread.model.zero_grad()


def zeroed(spread: Spread, seed: int, micro: Any) -> None:
    spread.model.zero_grad()
    raise Caught


@pytest.mark.parametrize("policy", ["skip", "raise", "zero"])
@pytest.mark.parametrize("how", [half, half_caught_inside], ids=lambda f: f.__name__)
@on_ranks(2)
def test_45_half_of_it_on_one_rank(rank: int, how: Fail, policy: Any) -> float:
    """Nobody can take the half out again: no step, on any rank, and the next window is right."""
    spread = built("ddp")
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    before = spread.whole()
    clipper = distclip.Clipper(spread.model, distclip.ZClip(warmup=2, max_norm=1e9), on_nonfinite=policy)
    run_window(spread, clipper, {1: how} if rank else {})
    if policy == "raise":
        with pytest.raises(distclip.NonFiniteError):
            clipper.step(opt)
    else:
        assert clipper.step(opt).nonfinite.item()
    for name, p in spread.whole().items():
        assert torch.equal(p, before[name])
    opt.zero_grad()
    seeds = run_window(spread, clipper, {}, first=10)
    norm = clipper.step(opt).total_norm.item()
    assert norm == pytest.approx(want([[seeds] * 2], 2)[0], rel=1e-5)
    return norm


@pytest.mark.parametrize("how", [half, half_caught_inside], ids=lambda f: f.__name__)
@on_row(ROWS_OF_HALVES)
def test_45_half_of_it_on_every_rank(row: str, how: Fail) -> None:
    spread = built(row)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    run_window(spread, clipper, {0: how, 2: before_forward})
    assert clipper.clip().skipped


@pytest.mark.parametrize("how", [half_and_zeroed, zeroed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("everywhere", [False, True])
@on_ranks(2)
def test_45_zeroed_and_gone_on(rank: int, everywhere: bool, how: Fail) -> float:
    """``zero_grad()`` where it is caught, as after running out of memory: the mean of what came after."""
    spread = built("ddp")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    seeds: list[Any] = [None, None]
    done = run_window(spread, clipper, {1: how} if rank or everywhere else {})
    assert done == ([0, 2, 3] if rank or everywhere else [0, 1, 2, 3])
    dist.all_gather_object(seeds, [s for s in done if s > 1] if len(done) == 3 else done)
    norm = clipper.clip().total_norm.item()
    assert norm == pytest.approx(want([seeds], 2)[0], rel=1e-5)
    return norm


def test_45_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    spread = built("single")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    with caplog.at_level(logging.WARNING, "distclip"):
        run_window(spread, clipper, {1: before_forward})
        assert not caplog.records
        clipper.clip()
        run_window(spread, clipper, {1: half})
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        "rank 0: the backward pass of micro-batch 2 of 4 raised before its end"
    ]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("call", ["clip", "step"])
def test_45_half_of_the_last(steps: int, call: str) -> None:
    """The step is called all the same: .grad holds a half."""
    spread = built("single")
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    for i in range(steps):
        with contextlib.suppress(Caught), clipper.accumulate(steps) as micro:
            micro.backward(loss(spread, i, broken=i == steps - 1))
    assert not micro.complete
    with pytest.raises(ValueError, match=r"raised before its end.*zero_grad"):
        clipper.clip() if call == "clip" else clipper.step(opt)
    opt.zero_grad()
    with clipper.accumulate(steps) as micro:
        micro.backward(loss(spread, 7))
    assert micro.complete
    assert clipper.clip().total_norm.item() == pytest.approx(want([[[7]]], 1)[0], rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 5.0, 2.0, 4.0), (3.0, 3.0, 3.0, 3.0)])
@on_ranks(2)
def test_45_with_weights(rank: int, weights: tuple[float, ...]) -> float:
    """Their sum is that of all ranks: the mean over all micro-batches that are there."""
    spread = built("ddp")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    net, total = model().double(), sum(weights) * 2 - weights[1]
    for seed, weight in enumerate(weights):
        with contextlib.suppress(Caught), clipper.accumulate(4) as micro:
            if rank and seed == 1:
                raise Caught
            micro.backward(loss(spread, seed), weight=weight)
        for share in range(1 if seed == 1 else 2):
            x, target = (t.chunk(2)[share] for t in batch(seed))
            (loss_of(net(x.double()), target) * weight / total).backward()
    norm = clipper.clip().total_norm.item()
    assert norm == pytest.approx(oracle.norm(oracle.dense_gradients(net.parameters())), rel=1e-5)
    return norm


@on_ranks(2)
def test_45_the_last_one_on_one_rank(rank: int) -> float:
    """Its next micro-batch is what the other rank waits for."""
    spread = built("ddp")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    seeds: list[Any] = [None, None]
    dist.all_gather_object(seeds, run_window(spread, clipper, {3: before_forward} if rank else {}))
    assert seeds == [[0, 1, 2, 3], [0, 1, 2, 4]]
    norm = clipper.clip().total_norm.item()
    assert norm == pytest.approx(want([seeds], 2)[0], rel=1e-5)
    return norm


def test_45_none_is_left_at_the_end() -> None:
    """The very last batch raises: the step says that the window is not complete."""
    spread = built("single")
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    for i in range(3):
        with contextlib.suppress(Caught), clipper.accumulate(4, last=i == 2) as micro:
            if i == 2:
                raise Caught
            micro.backward(loss(spread, i))
    with pytest.raises(ValueError, match="micro-batch 2 of 4"):
        clipper.clip()
    assert math.isfinite(spread.model[0].up.weight.grad.sum().item())  # type: ignore[index]
