"""Every scaler x every parallelism x every way to apply x everything that goes wrong: all ranks decide alike,
and train what one process trains. ``python -m tests.step.show`` prints the table."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.counting import compares
from tests.harness import on_row
from tests.step.spread import OPTIMIZERS, ROWS, SCALERS, built, kind, seeds, trained_alone, unchanged

STEPS = (None, None, math.inf, None, math.nan, None, None, None)
MAX_NORM = 2.0
INIT_SCALE, GROWTH_INTERVAL = 2.0**10, 2


class Step(NamedTuple):
    """What one rank saw of one step."""

    bad: str
    norm: float
    skipped: bool
    scale: float


def scales() -> list[float]:
    """What a scaler should hold after each of the steps."""
    scale, since, out = INIT_SCALE, 0, []
    for bad in STEPS:
        since = 0 if bad is not None else since + 1
        scale *= 0.5 if bad is not None else 2.0 if since == GROWTH_INTERVAL else 1.0
        since %= GROWTH_INTERVAL
        out.append(scale)
    return out


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("apply", ["inplace", "deferred"])
@on_row(ROWS)
def test_cell(row: str, apply: str, scaler: str) -> tuple[list[Step], float]:
    """Decisions, scales, norms and the parameters' error: the harness compares them bit for bit."""
    optimizer = "SGD" if apply == "inplace" else "AdamW"
    want, norms = trained_alone(STEPS, optimizer, MAX_NORM)
    spread, sc = built(row), SCALERS[scaler](init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL)
    opt = OPTIMIZERS[optimizer](spread.groups(), **kind(fused=apply == "deferred"))
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(MAX_NORM), apply=apply, **spread.kwargs)  # type: ignore[arg-type]
    assert clipper.plan is not None  # made outside the count
    steps = []
    for call, ((seed, bad), norm, scale) in enumerate(zip(seeds(STEPS), norms, scales(), strict=True), 1):
        opt.zero_grad()
        spread.backward(seed, sc.scale if sc else unchanged, bad)
        with CommDebugMode() as comm:
            report = clipper.step(opt, sc)
        assert comm.get_total_counts() == ROWS[row].collectives + compares(clipper, call)
        assert report.skipped.item() == report.nonfinite.item() == (bad is not None)
        assert report.clipped.item() == (bad is None)  # not vacuous
        if bad is None:
            assert report.total_norm.item() == pytest.approx(norm, rel=1e-4)
        if sc is not None:
            assert sc.get_scale() == scale
        # inf - inf on the way makes a NaN of an inf: not what is compared
        total = report.total_norm.item() if bad is None else 0.0
        steps.append(Step(str(bad), total, bool(report.skipped), sc.get_scale() if sc else 1.0))
    whole = spread.whole()
    assert whole.keys() == want.keys()
    error = torch.stack([(whole[name] - want[name]).abs().max() for name in want]).max().item()
    assert error < 2e-6
    return steps, error
