"""Mixed precision with accumulation, run as its users run it: under torchrun, interrupted and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.starting import start


def run(*options: str, ranks: int) -> str:
    """What rank 0 says. It has to end cleanly. ``ranks=0`` starts it without a launcher."""
    return start("amp_accumulation.py", *options, ranks=ranks)[0]


def said(label: str, out: str) -> float:
    (value,) = re.findall(rf"^{label}: (\S+)$", out, flags=re.MULTILINE)
    return float(value)


def test_float16_under_ddp_and_fsdp2_and_through_a_checkpoint(tmp_path: Path) -> None:
    """The same run, whole under DDP, in two parts under FSDP2: its threshold and scale continue."""
    whole = run("--dtype", "float16", ranks=2)
    assert "not finite, skipped, scale 1.34218e+08" in whole  # half of 2**28
    assert re.search(r"norm \S+ → \S+ \(×0\.\d+\), scale", whole)
    assert said("steps", whole) == 50

    resumed = ("--dtype", "float16", "--parallel", "fsdp2", "--checkpoint", str(tmp_path / "run.pt"))
    assert said("steps", run(*resumed, "--stop-after", "100", ranks=2)) == 25
    rest = run(*resumed, ranks=2)
    assert "resumed after: 100 micro-batches, 25 steps" in rest
    assert said("steps", rest) == 50
    assert said("weights", rest) == pytest.approx(said("weights", whole), rel=1e-4)
    last = [out.split("step 50: ")[1].split("\n")[0] for out in (rest, whole)]
    assert last[0] == last[1]  # norm, coefficient and scale, to three digits


def test_bfloat16_stopped_in_the_middle_of_a_window(tmp_path: Path) -> None:
    options = ("--checkpoint", str(tmp_path / "run.pt"))
    assert said("steps", run(*options, "--stop-after", "90", ranks=0)) == 22
    rest = run(*options, ranks=0)
    assert "resumed after: 90 micro-batches, 22 steps" in rest
    assert "scale" not in rest
    assert said("steps", rest) == 50  # the 23rd of the two micro-batches that were left
    assert (tmp_path / "run.pt.0").exists()
