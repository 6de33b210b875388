"""Gradient accumulation: no synchronisation before the last micro-batch, one clip, the mean of the losses."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from tests import oracle
from tests.harness import on_ranks, on_row
from tests.step.spread import (
    OPTIMIZERS,
    ROWS,
    SCALERS,
    Spread,
    batch,
    built,
    ddp,
    fsdp1,
    fsdp2,
    hsdp,
    loss_of,
    model,
    single,
)

WINDOWED = {name: row for name, row in ROWS.items() if name != "pipeline"}  # which splits its own batches
MAX_NORM = 2.0


class count_gradient_syncs(TorchDispatchMode):  # reads as a verb in `with`
    """Counts the reduce-scatters and all-reduces of DDP and FSDP. (Those of tensor parallelism, which are
    functional, move activations; all-gathers move parameters. CommDebugMode puts hooks on the modules, whose
    views FSDP2 warns of.)"""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            self.ops[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def by_one_process(windows: list[list[int]], optimizer: str = "SGD") -> tuple[nn.Module, list[float]]:
    """In float64, with the mean over the micro-batches that a window has."""
    net, norms = model().double(), []
    opt = OPTIMIZERS[optimizer](net.parameters(), foreach=False)
    for window in windows:
        opt.zero_grad()
        for seed in window:
            x, target = batch(seed)
            (loss_of(net(x.double()), target) / len(window)).backward()
        norms.append(oracle.norm(oracle.dense_gradients(net.parameters())))
        for p in net.parameters():
            p.grad *= min(1.0, MAX_NORM / (norms[-1] + 1e-6))  # type: ignore[operator]
        opt.step()
    return net, norms


def micro_loss(spread: Spread, seed: int) -> Tensor:
    x, target = spread.mine(seed)
    return loss_of(spread.model(x), target)


def assert_trained_alike(spread: Spread, alone: nn.Module) -> None:
    want = dict(alone.named_parameters())
    for name, got in spread.whole().items():
        torch.testing.assert_close(got, want[name].detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scaler", ["no scaler", "GradScaler"])
@on_row(WINDOWED)
def test_accumulates_to_the_mean_and_synchronises_once(row: str, scaler: str) -> list[float]:
    """Two whole windows of three micro-batches, and what is left: two, then one."""
    windows = [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    alone, norms = by_one_process(windows)
    spread, sc = built(row), SCALERS[scaler](init_scale=2.0**8, growth_interval=1)
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM))
    got, synchronised = [], Counter[int]()
    for window in windows:
        opt.zero_grad()
        for seed in window:
            with (
                count_gradient_syncs() as syncs,
                clipper.accumulate(3, last=seed == window[-1]) as micro,
            ):
                micro.backward(micro_loss(spread, seed), sc)
            assert micro.complete == (seed == window[-1])
            if not micro.complete:
                assert not syncs.ops
            synchronised.update(syncs.ops)
        report = clipper.step(opt, sc)
        assert report.clipped.item()
        got.append(report.total_norm.item())
    assert got == pytest.approx(norms, rel=1e-5)
    assert_trained_alike(spread, alone)
    assert min(synchronised.values(), default=0) >= (0 if row == "single" else len(windows))
    assert clipper.steps == len(windows)
    return got


@on_row(WINDOWED)
def test_clip_and_an_optimizer_of_ones_own(row: str) -> None:
    """Accumulated for clipper.clip() as well."""
    windows = [[0, 1], [2]]
    alone, _ = by_one_process(windows)
    spread = built(row)
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM))
    for window in windows:
        opt.zero_grad()
        for seed in window:
            with clipper.accumulate(2, last=seed == window[-1]) as micro:
                micro.backward(micro_loss(spread, seed))
        clipper.clip()
        opt.step()
    assert_trained_alike(spread, alone)


# --- restarts ------------------------------------------------------------------------------------------


@on_row({name: ROWS[name] for name in ("single", "ddp", "fsdp2")})
def test_a_restart_ends_the_window_that_it_interrupted(row: str) -> list[bool]:
    """Where the window stood is known again; the gradients of the micro-batches before are not, so it is
    the mean over those after."""
    whole = built(row)
    opt = OPTIMIZERS["SGD"](whole.groups(), foreach=False)
    clipper = distclip.Clipper(whole.model, distclip.GlobalNorm(MAX_NORM))
    for seed in range(2):
        with clipper.accumulate(4) as micro:
            micro.backward(micro_loss(whole, seed))
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)

    alone, norms = by_one_process([[2, 3], [4, 5, 6, 7]])
    spread = built(row)
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    resumed = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM))
    resumed.load_state_dict(torch.load(file))
    complete, got = [], []
    for seed in range(2, 8):
        with resumed.accumulate(4) as micro:
            micro.backward(micro_loss(spread, seed))
        complete.append(micro.complete)
        if micro.complete:
            got.append(resumed.step(opt).total_norm.item())
            opt.zero_grad()
    assert complete == [False, True, False, False, False, True]
    assert got == pytest.approx(norms, rel=1e-5)
    assert_trained_alike(spread, alone)
    return complete


def test_another_number_of_micro_batches_after_a_restart() -> None:
    """As many ranks fewer make more micro-batches."""
    spread = single()
    before = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    with before.accumulate(2):
        pass
    after = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    complete = []
    for _ in range(3):
        with after.accumulate(4) as micro:
            complete.append(micro.complete)
    assert complete == [False, False, True]


def test_a_window_that_an_error_ended_is_not_continued() -> None:
    spread = single()
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0), on_nonfinite="raise")
    for bad in (math.nan, None):
        opt.zero_grad()
        complete = []
        for seed in range(3):
            with clipper.accumulate(3) as micro:
                loss = micro_loss(spread, seed)
                micro.backward(loss if bad is None else loss * bad)
            complete.append(micro.complete)
        assert complete == [False, False, True]
        if bad is None:
            clipper.step(opt)
        else:
            with pytest.raises(distclip.NonFiniteError):
                clipper.step(opt)
    assert clipper.steps == 1


def test_arguments() -> None:
    clipper = distclip.Clipper(single().model, distclip.GlobalNorm(1.0))
    with pytest.raises(ValueError, match="steps=0"), clipper.accumulate(0):
        pass
    with clipper.accumulate(3):
        pass
    with pytest.raises(ValueError, match=r"steps=2.*window of 3"), clipper.accumulate(2):
        pass


# --- unsynchronised gradients --------------------------------------------------------------------------


def bits(spread: Spread) -> list[Tensor]:
    return [p.grad.detach().clone() for p in spread.model.parameters() if p.grad is not None]


def refused(clipper: distclip.Clipper, opt: Any, says: str, error: Any = ValueError) -> None:
    for call in (
        lambda: clipper.clip(),
        lambda: clipper.step(opt),
        lambda: distclip.unscale_(scaled(), opt, clipper),
    ):
        with pytest.raises(error, match=says):
            call()


def scaled() -> Any:
    scaler: Any = SCALERS["GradScaler"](init_scale=2.0)
    scaler.scale(torch.ones(()))
    return scaler


@on_row(WINDOWED)
def test_failure_12_inside_a_window(row: str) -> None:
    """On every rank, before the plan is made and after, and nothing is touched."""
    spread = built(row)
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    for steps in range(2):
        for seed in range(3):
            with clipper.accumulate(3) as micro:
                micro.backward(micro_loss(spread, seed))
            if not micro.complete:
                before = bits(spread)
                refused(clipper, opt, rf"micro-batch {seed + 1} of 3.*not synchronised.*micro.complete")
                for a, b in zip(bits(spread), before, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert clipper.step(opt).clipped.item()
        assert clipper.steps == steps + 1
        opt.zero_grad()


def without_sync(spread: Spread, seed: int) -> None:
    """As users do it on their own."""
    if hasattr(spread.model, "set_requires_gradient_sync"):
        spread.model.set_requires_gradient_sync(False)
        spread.backward(seed)
        spread.model.set_requires_gradient_sync(True)
    else:
        with spread.model.no_sync():  # type: ignore[operator]
            spread.backward(seed)


UNSYNCHRONISED: dict[str, Any] = {
    "DDP": ddp,
    "FSDP1 original": fsdp1,
    "FSDP1 flat": lambda: fsdp1(use_orig_params=False),
    "FSDP1 zero2": lambda: fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "FSDP2": fsdp2,
}


@pytest.mark.parametrize("kind", UNSYNCHRONISED)
@pytest.mark.parametrize("first", [True, False])
@on_ranks(2)
def test_failure_12_no_sync_of_ones_own(rank: int, kind: str, first: bool) -> None:
    """Each rank would clip by a norm of its own; under FSDP2 by 0. With a plan and without."""
    spread = UNSYNCHRONISED[kind]()
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    if not first:
        spread.backward(0)
        clipper.step(opt)
        opt.zero_grad()
    without_sync(spread, 1)
    if kind == "DDP":
        refused(clipper, opt, r"not.* been synchronised.*no_sync", distclip.OwnershipError)
    else:
        refused(clipper, opt, f"under {kind[:5].strip()} have not been synchronised.*no_sync")
    spread.backward(2)  # synchronises what has been accumulated
    assert clipper.step(opt).clipped.item()


@on_ranks(4)
def test_hybrid_sharding_without_its_all_reduce(rank: int) -> None:
    """The shards are summed, the replicas not: FSDP2 keeps that aside, and leaves no gradient."""
    spread = hsdp()
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    spread.model.set_requires_all_reduce(False)  # type: ignore[operator]
    spread.backward(1)
    spread.model.set_requires_all_reduce(True)  # type: ignore[operator]
    refused(clipper, opt, "under FSDP2 have not been synchronised")
    spread.backward(2)
    want = oracle.norm(oracle.dense_gradients(spread.model.parameters()))
    assert clipper.step(opt).total_norm.item() == pytest.approx(want, rel=1e-6)


@on_ranks(2)
def test_an_evaluation_before_the_clip_is_no_accumulation(rank: int) -> None:
    """DDP only remembers its last forward pass."""
    spread = ddp()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1e-3))
    spread.backward(1)
    with torch.no_grad():
        spread.model(torch.randn(2, 8))
    assert isinstance(spread.model, DistributedDataParallel)
    assert not spread.model.require_forward_param_sync
    assert clipper.clip().clipped.item()
