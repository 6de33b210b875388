"""``distclip run``: scripts that clip wrongly train as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.audit.launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "trains.py"


def trained(ranks: int, folder: Path, kind: str, command: str, *options: str) -> tuple[list[Any], str]:
    folder.mkdir()
    ended = launch(ranks, command, *options, SCRIPT, kind, "6", folder / "weights")
    assert ended.codes == [0] * ranks, ended.err
    return [torch.load(folder / f"weights.{r}", weights_only=True) for r in range(ranks)], ended.err[0]


@pytest.mark.parametrize(("kind", "ranks", "like"), [("twice", 1, "single"), ("iterator", 1, "single")])
def test_as_it_should_have_been(kind: str, ranks: int, like: str, tmp_path: Path) -> None:
    mine, said = trained(ranks, tmp_path / "run", kind, "run")
    want, _ = trained(ranks, tmp_path / "want", like, "alone")
    for a, b in zip(mine[0], want[0], strict=True):
        torch.testing.assert_close(a, b)
    assert "6 calls were distclip's" in said


def test_fsdp1_through_nn_utils(tmp_path: Path) -> None:
    """Each rank holds its part of the weights that FSDP1's own method would have given."""
    mine, said = trained(2, tmp_path / "run", "fsdp1", "run")
    want, _ = trained(2, tmp_path / "want", "fsdp1_method", "alone")
    for own, other in zip(mine, want, strict=True):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b)
    assert "torch.nn.utils.clip_grad_norm_, 6 ×" in said


def test_a_strategy_and_a_history(tmp_path: Path) -> None:
    history = tmp_path / "run.jsonl"
    trained(1, tmp_path / "run", "single", "run", "--strategy", "zclip", "--history", str(history))
    from distclip.monitor.run import read

    assert len(read(history)) == 6


def test_nothing_replaced_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("print('hello')\n")
    ended = launch(1, "run", script)
    assert ended.codes == [2]
    assert "nothing was replaced" in ended.err[0]


def test_a_strategy_that_there_is_not(tmp_path: Path) -> None:
    ended = launch(1, "run", "--strategy", "nonsense", SCRIPT, "single")
    assert ended.codes != [0]
    assert "zclip" in ended.err[0]


def test_a_history_under_accelerate(tmp_path: Path) -> None:
    history = tmp_path / "run.jsonl"
    ended = launch(1, "run", "--history", history, SCRIPTS / "frameworks.py", "accelerate")
    assert ended.codes == [0], ended.err
    from distclip.monitor.run import read

    assert len(read(history)) == 8
    assert "8 calls were distclip's; the latest norm was" in ended.err[0]


def test_a_strategy_that_leaves_out_steps(tmp_path: Path) -> None:
    """The script would take them."""
    ended = launch(1, "run", "--strategy", "skipspikes", SCRIPT, "single")
    assert ended.codes == [2]
    assert "there is no skipspikes" in ended.err[0]
