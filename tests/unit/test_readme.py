"""Every Python snippet of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

import distclip

README = Path(__file__).parents[2] / "README.md"


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).pow(2).sum()
    return loss


def test_snippets_run(capsys, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)  # a history is written
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(snippets) >= 4
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = {
        "model": model,
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu"),
        "batches": [torch.randn(2, 4) for _ in range(6)],
        "loss_of": loss_of,
    }
    loss_of(model, torch.ones(2, 4)).backward()
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    assert re.search(r"norm \d", capsys.readouterr().out)
    own = names["MovingAverage"]
    for _ in range(3):  # the second and later steps have a mean
        loss_of(model, 100 * torch.ones(2, 4)).backward()
        report = distclip.Clipper(model, own()).clip()  # type: ignore[operator]
    assert report.total_norm > 0


def test_the_two_commands_come_first() -> None:
    first = README.read_text().split("```")[1]
    assert first.splitlines()[1].startswith("bash launch/demo.sh")
    assert first.splitlines()[2].startswith("bash launch/test.sh")
