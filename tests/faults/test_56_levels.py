"""Failure 56, law 16: a level that stays is learned, and no run of skips is longer than ``patience``."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import distclip
from distclip.decide.norms import Norms
from distclip.inspection.advice import SKIPS
from tests.faults.levels import ADAPTIVE, BEFORE, SEQUENCES, Decisions, Training, noise

SHIFTS = ("twice", "ten times", "a thousand times", "constant, then twice", "constant, then a little more")


@pytest.mark.parametrize("sequence", SHIFTS)
@pytest.mark.parametrize("row", [name for name, row in ADAPTIVE.items() if row.learned_within])
def test_56_a_level_is_learned_within_the_steps_stated(row: str, sequence: str) -> None:
    training, bound = Decisions(ADAPTIVE[row].make()), ADAPTIVE[row].learned_within
    assert bound is not None
    steps = [training.step(norm) for norm in SEQUENCES[sequence]]
    at_first = steps[BEFORE]
    if "more" not in sequence and not row.startswith("Percentile") and sequence != "twice":
        assert at_first.skipped or at_first.coefficient < 1
    later = steps[BEFORE + bound :]
    assert len(later) > 50
    usual = sum(step.coefficient == 1 and not step.skipped for step in later) / len(later)
    assert usual > 0.9, usual
    assert training.step(1e3 * steps[-1].norm).left > 0


@pytest.mark.parametrize("jumps", ["norm", "loss", "both", "the loss while norms are 0"])
def test_56_with_the_loss(jumps: str) -> None:
    strategy = distclip.SkipSpikes(use_loss=True, patience=6)
    run = longest = 0
    for i in range(400):
        high = 10.0 if i >= 100 else 1.0
        norm = noise(i) * (high if jumps in ("norm", "both") else 0.0 if "0" in jumps and i >= 100 else 1.0)
        loss = noise(i + 7) * (high if jumps != "norm" else 1.0)
        total = torch.tensor(norm)
        skip = strategy.decide(Norms(total, total.view(1), loss=torch.tensor(loss))).skip
        run = run + 1 if skip else 0
        longest = max(longest, run)
    assert longest == 6
    assert run == 0


def test_56_a_loss_that_is_no_number_is_skipped_without_a_limit_and_without_a_trace() -> None:
    strategy = distclip.SkipSpikes(use_loss=True, patience=3)
    total = torch.tensor(1.0)
    for _ in range(20):
        assert strategy.decide(Norms(total, total.view(1), loss=torch.tensor(math.nan))).skip
    assert not strategy.decide(Norms(total, total.view(1), loss=torch.tensor(1.0))).skip
    assert strategy.skips == 0


@pytest.mark.parametrize("where", [3, 9])
def test_56_a_run_goes_on_after_a_checkpoint(where: int) -> None:
    """Saved in the midst of it."""
    one, other = (Training(distclip.SkipSpikes()) for _ in range(2))
    for i in range(100):
        one.step(noise(i))
    run = [one.step(5.0).skipped for _ in range(where)]
    other.clipper.load_state_dict(one.clipper.state_dict())
    run += [other.step(5.0).skipped for _ in range(20)]
    assert run == [True] * 10 + [False] * (10 + where)


@pytest.mark.parametrize("entrance", ["clip", "step", "step, scaled"])
def test_56_skips_in_a_row_are_logged_once(entrance: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "distclip")
    training = Training(distclip.SkipSpikes(patience=7), entrance)
    for i in range(700):
        training.step(noise(i) * 3.0 ** (i // 200))
    (record,) = [r for r in caplog.records if "in a row" in r.getMessage()]
    assert f"{SKIPS} steps in a row were skipped" in record.getMessage()
    assert "patience" in record.getMessage()


def test_56_norms_that_are_not_finite_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(distclip.GlobalNorm(1e9))
    for i in range(400):
        training.step(math.nan if i % 150 > 60 else noise(i))
    (record,) = [r for r in caplog.records if "in a row" in r.getMessage()]
    assert "NaN or infinite in 20 steps" in record.getMessage()


def test_56_single_spikes_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(distclip.SkipSpikes())
    skipped = [training.step(50.0 if i > 100 and i % 9 < 4 else noise(i)).skipped for i in range(500)]
    assert sum(skipped) > 100
    assert not [r for r in caplog.records if "in a row" in r.getMessage()]
