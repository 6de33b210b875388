"""A rank is killed, raises or is late in the middle of a step, under torchrun: the job ends with an error
that says so, or starts again from its checkpoint and takes the very steps that it would have taken."""

from __future__ import annotations

import json
import subprocess
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.starting import LAUNCH, environment, run

WORKER = Path(__file__).with_name("faulty.py")


def train(
    directory: Path, fault: str = "none", *, restarts: int = 0, timeout: int = 60
) -> subprocess.CompletedProcess[str]:
    env = environment(NPROC_PER_NODE="2", MAX_RESTARTS=str(restarts))
    return run("bash", LAUNCH / "torchrun.sh", WORKER, directory, fault, str(timeout), env=env)


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of the history in which a step was taken."""
    lines = (directory / "run.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "step" in row]


@cache
def uninterrupted() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The steps, and what the run ends with: weights and the strategies' state."""
    with TemporaryDirectory(prefix="distclip-faults-") as folder:
        directory = Path(folder)
        done = train(directory)
        assert done.returncode == 0, done.stderr
        steps, end = steps_of(directory), json.loads((directory / "end.json").read_text())
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert sum(row.get("clipped", False) for row in steps) >= 3  # the strategies have something to remember
    assert end["steps"] == 12
    return steps, end


@pytest.mark.parametrize(
    ("fault", "root_cause", "said"),
    [
        ("killed", "rank      : 1", "Signal 9 (SIGKILL) received by PID"),
        ("raises", "rank      : 1", "ValueError: the data of rank 1 are broken"),
        # Who waits in vain is the one that can tell: in the reduction of the norms.
        ("late", "rank      : 0", "Timed out waiting 8000ms"),
    ],
)
def test_the_job_ends_with_an_error_that_says_why(
    fault: str, root_cause: str, said: str, tmp_path: Path
) -> None:
    timeout = 8 if fault == "late" else 60  # the others are told that the connection is gone
    done = train(tmp_path, fault, timeout=timeout)
    ended = time.time()
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("Root Cause (first observed failure)") :]
    assert root_cause in summary
    assert said in done.stderr
    if fault == "late":
        assert "reduce_message" in done.stderr
    assert not (tmp_path / "end.json").exists()
    # From step 7, the last whole one, no rank has waited for another for longer than it may; 20 s are for
    # torchrun to notice and to end.
    assert ended - (tmp_path / "run.jsonl").stat().st_mtime < 20 + (timeout if fault == "late" else 0)
    assert [row["step"] for row in steps_of(tmp_path)] == list(range(1, 8))


@pytest.mark.parametrize("fault", ["killed", "raises"])
def test_the_job_goes_on_from_its_checkpoint(fault: str, tmp_path: Path) -> None:
    steps, end = uninterrupted()
    done = train(tmp_path, fault, restarts=1)
    assert done.returncode == 0, done.stderr
    # Step 7 was taken and recorded, and was taken again: from step 6, as if nothing had happened.
    replaced = (tmp_path / "run.jsonl.replaced").read_text()
    assert [row["step"] for row in map(json.loads, replaced.splitlines()) if "step" in row] == [7]
    assert steps_of(tmp_path) == steps
    assert json.loads((tmp_path / "end.json").read_text()) == end
