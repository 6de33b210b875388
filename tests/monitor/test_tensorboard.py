"""A real SummaryWriter gets what the history writes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import distclip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tensorboard's own imports
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter


def test_summary_writer(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(0.5))
    norms = []
    with SummaryWriter(str(tmp_path / "events")) as writer:
        history = distclip.History(tmp_path / "run.jsonl", to=writer, block=4)
        for step in range(6):
            model.zero_grad()
            model(torch.full((1, 3), step + 1.0)).sum().backward()
            report = clipper.clip()
            history.record(report, loss=torch.tensor(1.0 / (step + 1)))
            norms.append(report.total_norm.item())
        history.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = events.Tags()["scalars"]
    (tag,) = [t for t in tags if t.endswith("total_norm")]
    assert [e.value for e in events.Scalars(tag)] == pytest.approx(norms)
    assert len({e.step for e in events.Scalars(tag)}) == 6
    assert any("loss" in t for t in tags)
