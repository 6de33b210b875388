"""Synthetic histories with a known right answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from distclip.decide.transfer import Transfer
from distclip.inspection.advice import FIRST_LOOK, Advice, suggest_max_norm
from distclip.monitor import Recommendation, read, recommend
from distclip.monitor.run import HistoryError
from tests.monitor import synthetic
from tests.monitor.synthetic import P99, Floats


@pytest.fixture
def advise(tmp_path: Path):  # type: ignore[no-untyped-def]
    def advise(norms: Floats) -> Recommendation:
        return recommend(read(synthetic.write(tmp_path / "run.jsonl", norms)))

    return advise


def test_no_drift_in_a_few_steps(advise) -> None:  # type: ignore[no-untyped-def]
    """A young run falls: that is no reason yet for a threshold that follows."""
    assert advise(synthetic.drifting(1 / 3, steps=80)).strategy.startswith("GlobalNorm(")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [100, 1000, 20_000])
def test_stationary(advise, seed: int, steps: int) -> None:  # type: ignore[no-untyped-def]
    """Above 99 % of the steps; no warm-up, no drift, no spikes."""
    advised = advise(synthetic.stationary(steps, seed))
    assert advised.strategy == f"GlobalNorm({advised.max_norm:g})"
    assert advised.max_norm == pytest.approx(P99, rel=0.15 if steps < 1000 else 0.08)
    assert advised.expected_clip_rate == pytest.approx(0.01, abs=0.006 if steps >= 1000 else 0.011)
    assert (advised.warm_up_end, advised.spikes, advised.settled) == (None, (), True)
    assert advised.drift == pytest.approx(1, abs=0.35)
    assert advised.code == f"clipper = distclip.Clipper(model, distclip.GlobalNorm({advised.max_norm:g}))"


@pytest.mark.parametrize("factor", [4.0, 1 / 4, 20.0])
def test_drifting(advise, factor: float) -> None:  # type: ignore[no-untyped-def]
    """A fixed threshold goes stale: a percentile of the latest norms, with about the same clip rate."""
    advised = advise(synthetic.drifting(factor))
    assert advised.strategy.startswith("Percentile(95, multiplier=1.")
    assert advised.drift == pytest.approx(factor, rel=0.15)
    assert 0 < advised.expected_clip_rate < 0.05
    end = P99 * factor
    assert advised.max_norm == pytest.approx(end if factor > 1 else end * 1.3, rel=0.3)
    assert any("goes stale" in reason for reason in advised.reasons)


def test_mild_spikes(advise) -> None:  # type: ignore[no-untyped-def]
    norms, at = synthetic.spiky(5.0, 40)
    advised = advise(norms)
    assert [spike.step for spike in advised.spikes] == at
    assert advised.strategy == f"GlobalNorm({advised.max_norm:g})"
    assert advised.max_norm == pytest.approx(P99, rel=0.08)  # the spikes do not raise it
    assert advised.expected_clip_rate == pytest.approx(0.02, abs=0.006)


def test_large_spikes(advise) -> None:  # type: ignore[no-untyped-def]
    norms, at = synthetic.spiky(40.0, 8)
    advised = advise(norms)
    assert [spike.step for spike in advised.spikes] == at
    assert [round(spike.ratio) for spike in advised.spikes] == pytest.approx([40] * 8, abs=6)
    assert advised.strategy == f"Chain(SkipSpikes(), GlobalNorm({advised.max_norm:g}))"
    assert advised.max_norm == pytest.approx(P99, rel=0.08)


@pytest.mark.parametrize("length", [200, 800])
def test_warm_up(advise, length: int) -> None:  # type: ignore[no-untyped-def]
    """The threshold is that of the steady phase."""
    advised = advise(synthetic.warming_up(length))
    assert advised.warm_up_end == pytest.approx(length, rel=0.3)
    assert advised.max_norm == pytest.approx(P99, rel=0.08)
    assert advised.strategy == f"GlobalNorm({advised.max_norm:g})"
    assert any("warm-up" in reason for reason in advised.reasons)


def test_quiet_beginning(advise) -> None:  # type: ignore[no-untyped-def]
    norms = synthetic.stationary()
    norms[:300] *= 0.1
    advised = advise(norms)
    assert advised.warm_up_end == pytest.approx(300, rel=0.15)
    assert advised.max_norm == pytest.approx(P99, rel=0.08)


def test_nonfinite_steps_are_left_out(advise) -> None:  # type: ignore[no-untyped-def]
    norms = synthetic.stationary()
    norms[1000:1100], norms[2000] = math.nan, math.inf
    advised = advise(norms)
    assert advised.nonfinite == 101
    assert advised.max_norm == pytest.approx(P99, rel=0.08)
    assert any("101 of 4000 steps" in reason and "cause" in reason for reason in advised.reasons)


def test_never_settles(advise) -> None:  # type: ignore[no-untyped-def]
    norms = synthetic.stationary(1000)
    norms[700:] *= 50
    advised = advise(norms)
    assert not advised.settled
    assert advised.max_norm == pytest.approx(50 * P99, rel=0.15)  # the level it has come to


def test_every_norm_the_same(advise) -> None:  # type: ignore[no-untyped-def]
    assert advise(np.full(500, 0.25)).strategy == "GlobalNorm(0.25)"


def test_too_little(advise) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HistoryError, match="19 finite norms"):
        advise(synthetic.stationary(19))
    assert "first guess" in advise(synthetic.stationary(50)).reasons[0]


def test_scale_free(advise) -> None:  # type: ignore[no-untyped-def]
    norms, _ = synthetic.spiky(5.0, 10)
    one, other = advise(norms), advise(norms * 1e-6)
    assert other.max_norm == pytest.approx(one.max_norm * 1e-6, rel=0.05)
    assert [s.step for s in one.spikes] == [s.step for s in other.spikes]


@pytest.mark.parametrize("norms", [[], [0.0], [math.nan, math.inf]])
def test_suggestion_needs_a_norm(norms: list[float]) -> None:
    with pytest.raises(ValueError, match="no norm is positive"):
        suggest_max_norm(torch.tensor(norms))


class TestAdvice:
    """Once per run, on rank 0, without a host sync per step."""

    def observe(self, norms: list[float], max_norm: float, **arguments: bool) -> Advice:
        advice = Advice(**arguments)
        for norm in norms:
            advice.observe(synthetic.report(norm, max_norm=max_norm))
        return advice

    def test_before_backward(self, caplog: pytest.LogCaptureFixture) -> None:
        self.observe([0.0] * 500, 1.0)
        assert len(caplog.records) == 1
        assert "after backward()" in caplog.text

    def test_what_arrives_late_is_said_late(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arrived = False
        monkeypatch.setattr(Transfer, "arrived", property(lambda self: arrived))
        advice = Advice()
        for _ in range(FIRST_LOOK + 150):
            advice.observe(synthetic.report(0.0))
        assert not caplog.records
        arrived = True
        advice.observe(synthetic.report(0.0))
        assert "after backward()" in caplog.text
        assert "first 10 steps" in caplog.text

    def test_too_low(self, caplog: pytest.LogCaptureFixture, advise) -> None:  # type: ignore[no-untyped-def]
        norms = synthetic.stationary(1000)
        self.observe(norms.tolist(), 0.1)
        assert len(caplog.records) == 1
        # After ten steps and two blocks: the last 200 of 210.
        assert f"max_norm={advise(norms[10:210]).max_norm:g}." in caplog.text

    def test_just_not_too_low(self, caplog: pytest.LogCaptureFixture) -> None:
        self.observe([2.0 if i % 20 else 0.5 for i in range(900)], 1.0)
        assert not caplog.records

    def test_never_clipped(self, caplog: pytest.LogCaptureFixture, advise) -> None:  # type: ignore[no-untyped-def]
        norms = synthetic.stationary(2000)
        self.observe(norms[:1009].tolist(), 50.0)
        assert not caplog.records
        self.observe(norms.tolist(), 50.0)
        assert len(caplog.records) == 1
        assert f"max_norm={advise(norms[10:1010]).max_norm:g}." in caplog.text

    @pytest.mark.parametrize("max_norm", [0.1, math.inf])
    def test_silent(self, max_norm: float, caplog: pytest.LogCaptureFixture) -> None:
        """Where a parameter clipped in each step is as it should be, and where clipping is not meant."""
        norms = synthetic.stationary(1500).tolist()
        advice = self.observe(norms, max_norm, whole=math.isinf(max_norm))
        assert not caplog.records
        assert advice.done == (max_norm < 1)

    def test_other_ranks_are_silent(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "3")
        self.observe([0.0] * 500, 1.0)
        assert not caplog.records

    def test_steps_that_are_being_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their tensors cannot be read then: reading one spoils the capture."""
        with FakeTensorMode():
            zero = torch.zeros((), device="cuda")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        advice = Advice()
        for _ in range(FIRST_LOOK):
            advice.observe(replace(synthetic.report(1.0), total_norm=zero))
        assert not advice._pending

    def test_no_sync_per_step(self) -> None:

        reports = [synthetic.report(n) for n in synthetic.stationary(300).tolist()]
        advice = Advice()
        with synthetic.counting_reads() as reads:
            for each in reports:
                advice.observe(each)
        assert reads == ["tolist"] * 3  # after 10, 110, 210 steps
