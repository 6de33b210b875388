"""Every Python snippet of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import distclip
from tests.integrations.accelerators import environment
from tests.integrations.test_transformers import trainer

README = Path(__file__).parents[2] / "README.md"


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).pow(2).sum()
    return loss


# Lightning's, where Slurm is installed.
@pytest.mark.filterwarnings("ignore:The `srun` command is available on your system but is not used")
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
    with environment(False):
        hugging_face = trainer(tmp_path)
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(nn.Linear(4, 3))
        names |= {"accelerator": accelerator, "trainer": hugging_face}
        names["Trainer"] = partial(lightning.Trainer, accelerator="cpu")
        for snippet in snippets:
            exec(compile(snippet, str(README), "exec"), names)
        loss_of(prepared, torch.ones(2, 4)).backward()
        norm = accelerator.clip_grad_norm_(prepared.parameters(), 1e-3)
        assert norm > 1e-3
        assert distclip.total_grad_norm(prepared).item() == pytest.approx(1e-3, rel=1e-3)
        hugging_face.train()
    assert any("clip_threshold" in entry for entry in hugging_face.state.log_history)
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
