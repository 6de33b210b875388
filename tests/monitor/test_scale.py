"""A million steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.monitor import synthetic


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    norms = synthetic.stationary(1_000_000)
    norms[[123_456, 777_777]] = 30.0
    return synthetic.write(tmp_path_factory.mktemp("million") / "run.jsonl", norms)


# (getrusage's maximum would be that of the process it was forked from.)
PROGRAM = """
import re, sys
from pathlib import Path
from distclip.cli import main
from tests.counting import count_calls
with count_calls() as calls:
    code = main(sys.argv[1:])
kilobytes = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(calls.count, int(kilobytes[1]) / 1e6, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["recommend", "report"])
def test_a_million_steps(command: str, million: Path, tmp_path: Path) -> None:
    """In a few calls of Python for each step, and 1 GB."""
    output = ["--output", str(tmp_path / "report.html")] if command == "report" else []
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, str(million), *output],
        capture_output=True,
        text=True,
        check=True,
    )
    calls, gigabytes = map(float, result.stderr.split())
    assert calls < 6_000_000  # 4.2 a step
    assert gigabytes < 1
    if command == "report":
        page = (tmp_path / "report.html").read_text()
        assert len(page) < 8_000_000
        assert page.count('"ratio":') == 2  # both spikes
    else:
        assert "spikes, the largest 2 of 2" in result.stdout


def test_no_spike_is_lost() -> None:
    from distclip.monitor.envelope import envelope

    norms = synthetic.stationary(1_000_003)
    at = np.array([0, 1, 499_999, 1_000_002])
    norms[at] = 30.0
    line = envelope(np.arange(1, len(norms) + 1), norms)
    assert len(line.step) <= 1200
    assert (line.high == 30).sum() == 3  # the first two share a bin
    assert (line.low <= line.middle).all()
    assert (line.middle <= line.high).all()
