"""The demo's own history: it replays exactly, and the demo ends with a recommendation and a page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import distclip
from distclip.monitor import read, replay
from tests.starting import EXAMPLE, python, torchrun


def test_demo(tmp_path: Path) -> None:
    options = ("--steps", "150", "--batch-size", "8", "--seq-len", "24")
    done = python(*torchrun(2), EXAMPLE, *options, "--history", tmp_path / "run.jsonl")
    *_, recommended, report = done.stdout.strip().splitlines()
    assert re.fullmatch(r"recommended: \w+\(.*\) \([\d.]+% of the steps clipped, here [\d.]+%\)", recommended)
    assert report == f"report: {tmp_path / 'run.html'}"
    assert "<html" in (tmp_path / "run.html").read_text()[:200].lower()

    run = read(tmp_path / "run.jsonl")
    assert len(run) == 150
    again = [r for _, r in replay(run, distclip.GlobalNorm(1.0), on_nonfinite="zero")]
    for recorded, field in {
        "norm": "total_norm",
        "threshold": "threshold",
        "coefficient": "coefficient",
    }.items():
        live = np.asarray(getattr(run, recorded), dtype=np.float32)  # as they were, before decimal digits
        replayed = np.array([getattr(r, field).item() for r in again], dtype=live.dtype)
        assert np.array_equal(live, replayed), field
    assert run.clipped.any()
