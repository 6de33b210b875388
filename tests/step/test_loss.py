"""The loss as something to judge: each rank has its own, and all must come to the same decision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import monitor
from distclip.monitor.run import HistoryError
from tests.harness import on_ranks


def judge() -> distclip.SkipSpikes:
    return distclip.SkipSpikes(4, 3.0, min_history=3, use_loss=True)


@on_ranks(2)
def test_one_ranks_spike_skips_the_step_on_all(rank: int) -> list[bool]:
    model = DDP(nn.Linear(4, 4))
    clipper = distclip.Clipper(model, distclip.Chain(judge(), distclip.GlobalNorm(1.0)))
    skipped = []
    for step in range(6):
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        loss = torch.tensor(2.0 + 0.1 * step + (100.0 if step == 4 and rank == 1 else 0.0))
        with CommDebugMode() as comm:
            report = clipper.clip(loss=loss)
        if step:  # the first makes the plan; copies are compared at the powers of two
            assert comm.get_total_counts() == 1 + (step + 1 in (2, 4))
        skipped.append(bool(report.skipped))
        assert report.loss is not None
        torch.testing.assert_close(report.loss, torch.tensor(2.0 + 0.1 * step + 50.0 * (step == 4)))
    assert skipped == [False] * 4 + [True, False]
    return skipped


@on_ranks(2)
def test_a_nan_on_one_rank_is_skipped_even_at_first(rank: int) -> None:
    model = DDP(nn.Linear(4, 4))
    clipper = distclip.Clipper(model, judge())
    model(torch.ones(2, 4)).sum().backward()
    report = clipper.clip(loss=torch.tensor(math.nan if rank else 1.0))
    assert report.skipped
    assert not report.nonfinite
    assert clipper.strategy.losses.count == 0  # type: ignore[union-attr]
    assert clipper.clip(loss=torch.tensor(1.0)).loss == 1.0


@on_ranks(2)
def test_the_last_stage_alone_has_a_loss(rank: int) -> None:
    stage = nn.Linear(4, 4)
    clipper = distclip.Clipper(stage, judge(), stages=dist.group.WORLD)
    for parameter in stage.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
    for loss, skipped in ((2.0, False), (2.1, False), (2.05, False), (90.0, True), (2.0, False)):
        report = clipper.clip(loss=torch.tensor(loss) if rank == 1 else None)
        assert report.loss == torch.tensor(loss)
        assert bool(report.skipped) == skipped
    report = clipper.clip()  # nobody says
    assert report.loss.isnan()
    assert report.skipped


def test_without_a_loss_there_is_nothing_to_judge() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match="judges the loss"):
        distclip.Clipper(model, judge()).clip()
    with pytest.raises(ValueError, match="one number"):
        distclip.Clipper(model, judge()).clip(loss=torch.ones(2))
    with pytest.raises(ValueError, match="norm_type=inf"):
        distclip.SkipSpikes(use_loss=True, norm_type=math.inf)


def test_a_recorded_loss_replays(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(8))
    clipper = distclip.Clipper([parameter], judge())
    generator = torch.Generator().manual_seed(0)
    live = []
    with distclip.History(tmp_path / "run.jsonl") as history:
        for step in range(60):
            parameter.grad = torch.randn(8, generator=generator)
            loss = torch.randn((), generator=generator) + (20.0 if step in (20, 41) else 2.0)
            report = clipper.clip(loss=loss)
            live.append((report.skipped.item(), report.threshold.item()))
            history.record(report)
    replayed = [
        (report.skipped.item(), report.threshold.item())
        for _, report in monitor.replay(tmp_path / "run.jsonl", judge())
    ]
    assert replayed == live
    assert sum(skipped for skipped, _ in live) >= 2
    parameter.grad = torch.ones(8)
    plain = distclip.Clipper([parameter], distclip.GlobalNorm(1.0))
    with distclip.History(tmp_path / "no_loss.jsonl") as history:
        history.record(plain.clip())
    with pytest.raises(HistoryError, match="not recorded"):
        list(monitor.replay(tmp_path / "no_loss.jsonl", judge()))
