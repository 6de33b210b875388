"""What release 0.1.0 has saved goes on here: states, strategies and reports, pickled by that release after
five steps, with the norm that it clipped the sixth to."""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip

SAVED: dict[str, tuple[bytes, float]] = pickle.loads(
    gzip.decompress(Path(__file__).with_name("of_0_1_0.pickle.gz").read_bytes())
)


def linear() -> torch.nn.Linear:
    model = torch.nn.Linear(4, 3)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, 0.1)
    return model


def sixth(clipper: distclip.Clipper, model: torch.nn.Linear) -> float:
    model.weight.grad, model.bias.grad = torch.full((3, 4), 3.0), torch.full((3,), 0.05)
    return float(clipper.clip().clipped_norm)


@pytest.mark.parametrize("name", SAVED)
def test_a_pickled_strategy_goes_on(name: str) -> None:
    data, then = SAVED[name]
    loaded: dict[str, Any] = pickle.loads(data)
    model = linear()
    strategy = loaded["strategy"]
    assert sixth(distclip.Clipper(model, strategy), model) == pytest.approx(then, rel=1e-6)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_state_goes_on(name: str) -> None:
    data, then = SAVED[name]
    state = pickle.loads(data)["clipper"]
    model = linear()
    made: dict[str, distclip.Strategy] = {
        "GlobalNorm": distclip.GlobalNorm(1.0),
        "p = 1": distclip.GlobalNorm(0.5, 1),
        "PerParameter": distclip.PerParameter(0.1),
        "PerGroup": distclip.PerGroup({"weight": 0.1, "*": 1.0}),
        "Percentile": distclip.Percentile(history=8, warmup=2),
        "ZClip": distclip.ZClip(warmup=2),
        "AdaGC": distclip.AdaGC(warmup=2),
        "SkipSpikes": distclip.SkipSpikes(window=8, min_history=3),
        "AGC": distclip.AGC(),
        "Value": distclip.Value(0.1),
        "Chain": distclip.Chain(distclip.SkipSpikes(window=8, min_history=3), distclip.GlobalNorm(1.0)),
    }
    clipper = distclip.Clipper(model, made[name])
    clipper.load_state_dict(state)
    assert sixth(clipper, model) == pytest.approx(then, rel=1e-6)


@pytest.mark.parametrize("name", SAVED)
def test_a_pickled_report_reads(name: str) -> None:
    report = pickle.loads(SAVED[name][0])["report"]
    assert isinstance(report, distclip.ClipReport)
    assert report.to_dict()["total_norm"] > 0
    torch.save(report, io.BytesIO())
