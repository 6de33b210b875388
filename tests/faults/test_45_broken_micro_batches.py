"""45: a micro-batch that raises and is caught does not count, wherever it raised, and on whichever ranks."""

from __future__ import annotations

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
from tests.training.spread import ROWS, Spread, batch, built, loss_of, model

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
    for fails in ({i: FAILURES[how] for i in places}, {}):
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
