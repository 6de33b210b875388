"""A replay decides, bit for bit, what the live run did."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import distclip
from distclip.decide.report import ClipReport
from distclip.monitor import History, parse_strategy, read, replay
from distclip.monitor.history import written
from distclip.monitor.replaying import differences, tally
from distclip.monitor.run import HistoryError

STEPS = 120
STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "global": lambda: distclip.GlobalNorm(0.3),
    "schedule": lambda: distclip.GlobalNorm(distclip.Warmup(2.0, 0.2, steps=50)),
    "percentile": lambda: distclip.Percentile(80, multiplier=1.1, history=40, warmup=10, initial=0.5),
    "zclip": lambda: distclip.ZClip(warmup=10, z_threshold=1.5, max_norm=5.0),
    "skip": lambda: distclip.SkipSpikes(window=30, sigma=2.0, min_history=10),
    "chain": lambda: distclip.Chain(
        distclip.SkipSpikes(window=30, sigma=3.0, min_history=10), distclip.GlobalNorm(0.3)
    ),
    "value": lambda: distclip.Value(0.05),
    "per parameter": lambda: distclip.PerParameter(0.1),
    "adagc": lambda: distclip.AdaGC(warmup=10, max_norm=0.5),
    "fine chain": lambda: distclip.Chain(distclip.AdaGC(warmup=10), distclip.GlobalNorm(0.3)),
}


def recorded(path: Path, norms: list[float], skipped: tuple[int, ...] = ()) -> Path:
    lines = [
        f'{{"step": {i}, "total_norm": {norm}, "skipped": {str(i in skipped).lower()}}}\n'
        for i, norm in enumerate(norms)
    ]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("norms", "skipped", "said"),
    [
        ([1.0] * 30, (), []),
        ([1.0, 0.0] * 15, (), ["15 norms are 0"]),
        ([1.0] * 30, tuple(range(5, 15)), []),
        ([1.0] * 30, tuple(range(5, 16)), ["11 steps in a row were skipped.*patience=10"]),
        ([1.0] * 15 + [0.0] * 3 + [1.0] * 12, tuple(range(18, 30)), ["3 norms are 0", "12 steps in a row"]),
    ],
)
def test_where_a_replay_differs_from_what_0_1_0_did(
    norms: list[float], skipped: tuple[int, ...], said: list[str], tmp_path: Path
) -> None:
    found = differences(read(recorded(tmp_path / "run.jsonl", norms, skipped)))
    assert len(found) == len(said)
    for sentence, expected in zip(found, said, strict=True):
        assert re.search(expected, sentence)


@pytest.mark.parametrize(
    ("strategy", "lacks"),
    [
        (distclip.AGC(), "the norms of the weights"),
        (distclip.Chain(distclip.Value(1.0), distclip.GlobalNorm(1.0)), "the norm that its Value leaves"),
    ],
)
def test_what_no_history_has(strategy: distclip.Strategy, lacks: str, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=f"needs {lacks}"):
        replay(recorded(tmp_path / "run.jsonl", [1.0] * 9), strategy)


FIELDS = ("total_norm", "clipped_norm", "coefficient", "threshold", "clipped", "nonfinite", "skipped")


def train(path: Path, strategy: distclip.Strategy, on_nonfinite: str) -> list[ClipReport]:
    """A short run with spikes and two non-finite steps; the reports of it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = distclip.Clipper(model, strategy, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
    reports = []
    with History(path, strategy=strategy, param_norms_every=1, block=7) as history:
        for step in range(STEPS):
            x = torch.randn(8, 6) * (20 if step in (40, 41, 90) else 1)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step in (25, 60):
                next(model.parameters()).grad[0, 0] = math.nan if step == 25 else math.inf  # type: ignore[index]
            report = clipper.step(optimizer, param_norms=history.wants_param_norms)
            history.record(report, loss=loss)
            reports.append(report)
    return reports


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("on_nonfinite", ["skip", "zero"])
def test_equals_the_live_run(name: str, on_nonfinite: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    live = train(path, STRATEGIES[name](), on_nonfinite)
    again = list(replay(path, STRATEGIES[name](), on_nonfinite=on_nonfinite))  # type: ignore[arg-type]
    assert [step for step, _ in again] == list(range(1, STEPS + 1))
    for (step, mine), theirs in zip(again, live, strict=True):
        for field in FIELDS:
            a, b = getattr(mine, field), getattr(theirs, field)
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)), (step, field, a, b)
    flags = [bool(r.clipped | r.skipped) for r in live]
    assert any(flags[12:])  # not vacuous


def test_tally_is_the_replay(tmp_path: Path) -> None:
    """Also where it takes the short cut of a strategy without memory."""
    path = tmp_path / "run.jsonl"
    train(path, distclip.GlobalNorm(0.3), "skip")
    run = read(path)
    for strategy in (distclip.GlobalNorm(0.2), distclip.ZClip(warmup=10), distclip.PerParameter(0.1)):
        mine = tally(run, strategy)
        reports = [report for _, report in replay(run, strategy)]
        for field in ("coefficient", "clipped", "skipped", "threshold"):
            expected = torch.stack([getattr(r, field) for r in reports]).double().numpy()
            found = getattr(mine, field).astype(float)
            assert np.array_equal(found, expected, equal_nan=True), (strategy, field)


def test_the_strategy_given_is_not_changed(tmp_path: Path) -> None:
    train(tmp_path / "run.jsonl", distclip.GlobalNorm(0.3), "skip")
    strategy = distclip.ZClip(warmup=10)
    before = {name: value.clone() for name, value in strategy.state_dict().items()}
    assert len(list(replay(tmp_path / "run.jsonl", strategy))) == STEPS
    assert all(torch.equal(value, before[name]) for name, value in strategy.state_dict().items())


def test_what_the_record_lacks(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        model = nn.Linear(2, 2)
        clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
        for _ in range(3):
            model(torch.ones(2)).sum().backward()
            history.record(clipper.clip())
    with pytest.raises(HistoryError, match=r"0 of 3 steps have them.*param_norms_every=1"):
        replay(path, distclip.PerParameter(1.0))
    with pytest.raises(HistoryError, match="needs norms of p = inf"):
        replay(path, distclip.Value(1.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zclip", "ZClip(alpha=0.97, z_threshold=2.5, max_norm=1.0)"),
        ("global(1.0)", "GlobalNorm(max_norm=1.0, norm_type=2.0)"),
        ("GlobalNorm(max_norm=inf)", "GlobalNorm(max_norm=inf, norm_type=2.0)"),
        ("distclip.Percentile(95, multiplier=2)", "Percentile(percentile=95.0, multiplier=2.0, warmup=100)"),
        ("skip_spikes(sigma=8)", "SkipSpikes(sigma=8.0, min_history=64)"),
        ("percentile(10, history=None, warmup=1)", "Percentile(percentile=10.0, multiplier=2.0, warmup=1)"),
    ],
)
def test_notation(text: str, expected: str) -> None:
    assert written(parse_strategy(text)) == expected


def test_notation_nests() -> None:
    chain = parse_strategy("chain(skip_spikes, global(warmup(10, 1, 100)))")
    assert isinstance(chain, distclip.Chain)
    assert [type(link).__name__ for link in chain.each()] == ["SkipSpikes", "GlobalNorm"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zklip", "unknown name 'zklip'; known are"),
        ("global(-1)", "max_norm=-1"),
        ("global(", "strategy 'global\\('"),
        ("__import__('os').system('false')", "strategy"),
        ("global(open('x'))", "unknown name 'open'"),
        ("warmup(10, 1, 100)", "not a strategy"),
        ("3", "not a strategy"),
    ],
)
def test_notation_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_strategy(text)
