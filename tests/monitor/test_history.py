"""What is recorded is in the file: once, whole, after crashes and restarts too."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.monitor import History
from tests.harness import on_ranks
from tests.monitor.synthetic import counting_reads, report


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if "step" in row]


def steps(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


def test_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with History(path, block=2) as history:
        history.record(report(0.1), loss=torch.tensor(2.5, requires_grad=True), lr=0.01)
        history.record(report(4.0), loss=2.25)
        history.record(report(math.nan), step=7)
    head = json.loads(path.read_text().splitlines()[0])
    assert (head["format"], head["world_size"], head["norm_type"]) == (1, 1, 2.0)
    first, second, third = rows(path)
    assert first == {"step": 1, "total_norm": 0.100000001, "threshold": 1, "loss": 2.5, "lr": 0.01}
    assert second == {
        "step": 2, "total_norm": 4, "threshold": 1, "coefficient": 0.25, "clipped": True, "loss": 2.25
    }  # fmt: skip
    assert third == {"step": 7, "total_norm": "nan", "threshold": 1, "skipped": True, "nonfinite": True}


def test_every_float32_comes_back(tmp_path: Path) -> None:
    """Nine digits tell any two float32 apart, to the smallest and the largest."""
    patterns = torch.randint(0, 0x7F80_0000, (3000,), dtype=torch.int32)
    norms = torch.cat([patterns, torch.tensor([1, 0x7F7F_FFFF, 0x0080_0000])]).int().view(torch.float32)
    with History(tmp_path / "run.jsonl") as history:
        for norm in norms.tolist():
            history.record(report(norm, max_norm=math.inf))
    read = torch.tensor([row["total_norm"] for row in rows(tmp_path / "run.jsonl")])
    assert torch.equal(read, norms)


def test_no_host_sync_but_in_blocks(tmp_path: Path) -> None:
    reports = [report(0.5 + 0.01 * i) for i in range(200)]
    loss = torch.tensor(1.0)
    history = History(tmp_path / "run.jsonl", block=100, seconds=math.inf)
    with counting_reads() as reads:
        for each in reports[:99]:
            history.record(each, loss=loss)
    assert reads == []
    with counting_reads() as reads:
        history.record(reports[99], loss=loss)
    assert reads == ["tolist"]
    assert len(steps(tmp_path / "run.jsonl")) == 100
    history.close()


def test_cost_of_a_step(tmp_path: Path) -> None:
    """13 µs a step, file included, on a busy core; the bound is generous."""
    each, loss = report(1.5), torch.tensor(1.0)
    history = History(tmp_path / "run.jsonl")
    best = math.inf
    for _ in range(5):
        begin = time.process_time()
        for _ in range(1000):
            history.record(each, loss=loss, lr=0.1)
        best = min(best, (time.process_time() - begin) / 1000)
    history.close()
    assert best < 60e-6, f"{best * 1e6:.1f} µs a step"


def test_values_are_those_of_the_step(tmp_path: Path) -> None:
    """A strategy may report a buffer of its own, which it changes in the next step."""
    threshold = torch.tensor(1.0)
    with History(tmp_path / "run.jsonl") as history:
        for value in (1.0, 2.0, 3.0):
            threshold.fill_(value)
            each = report(0.5)
            object.__setattr__(each, "threshold", threshold)
            history.record(each)
    assert [row["threshold"] for row in rows(tmp_path / "run.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("given", ["step", "state", "nothing"])
def test_resumes_without_doubled_steps(tmp_path: Path, given: str, caplog: pytest.LogCaptureFixture) -> None:
    """The run was killed at step 8; its last checkpoint was of step 5."""
    path = tmp_path / "run.jsonl"
    with History(path, block=3) as first:
        for step in range(1, 6):
            first.record(report(step))
        state = first.state_dict()
        for step in range(6, 9):
            first.record(report(step))
    with History(path, block=2) as second:
        if given == "state":
            second.load_state_dict(state)
        for step in range(6, 11):
            second.record(report(10 * step), step=step if given == "step" else None)
    if given == "nothing":  # it cannot know, and goes on
        assert steps(path) == list(range(1, 14))
        return
    assert steps(path) == list(range(1, 11))
    assert [row["total_norm"] for row in rows(path)] == [1, 2, 3, 4, 5, 60, 70, 80, 90, 100]
    assert steps(Path(f"{path}.replaced")) == [6, 7, 8]  # nothing is lost
    assert "step 6 is recorded again" in caplog.text


def test_goes_back_within_a_process(tmp_path: Path) -> None:
    with History(tmp_path / "run.jsonl") as history:
        for step in (1, 2, 3, 2, 3, 4):
            history.record(report(step), step=step)
    assert steps(tmp_path / "run.jsonl") == [1, 2, 3, 4]


@pytest.mark.parametrize("tail", ['{"step":4,"tot', '{"step":4,"total_norm":1}', ""])
def test_torn_last_line(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step in range(1, 4):
            history.record(report(step))
    with open(path, "a") as file:
        file.write(tail)
    whole = 4 if tail.endswith("}") else 3
    with History(path) as history:
        history.record(report(9.0))
    assert steps(path) == list(range(1, whole + 2))


def test_killed(tmp_path: Path) -> None:
    """SIGKILL at any moment: whole blocks are there, and the next process goes on after them."""
    path = tmp_path / "run.jsonl"
    program = (
        "import sys; from distclip.monitor import History; from tests.monitor.synthetic import report\n"
        "history = History(sys.argv[1], block=10)\n"
        "while True: history.record(report(1.0)); print(flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(57):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    before = steps(path)
    assert len(before) >= 50
    assert len(before) % 10 == 0
    with History(path) as history:
        history.record(report(2.0))
    assert steps(path) == list(range(1, len(before) + 2))


def test_exit_without_close(tmp_path: Path) -> None:
    program = (
        "import sys; from distclip.monitor import History; from tests.monitor.synthetic import report\n"
        "history = History(sys.argv[1])\nfor _ in range(5): history.record(report(1.0))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.jsonl")], check=True)
    assert steps(tmp_path / "run.jsonl") == [1, 2, 3, 4, 5]


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Half a block is written when the disk is full: logged, taken back, and written when there is room."""
    history = History(tmp_path / "run.jsonl", block=2)
    history.record(report(1.0))
    history.record(report(2.0))
    assert history._journal is not None
    real = history._journal._file

    class Full:
        def write(self, data: bytes) -> int:
            real.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def truncate(self, size: int) -> int:
            return real.truncate(size)

    monkeypatch.setattr(history._journal, "_file", Full())
    history.record(report(3.0))
    history.record(report(4.0))
    assert steps(tmp_path / "run.jsonl") == [1, 2]
    assert "No space left" in caplog.text
    monkeypatch.setattr(history._journal, "_file", real)
    history.record(report(5.0))
    history.close()
    assert steps(tmp_path / "run.jsonl") == [1, 2, 3, 4, 5]


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logged: list[dict[str, Any]] = []
    with History(tmp_path / "run.jsonl", to=logged.append, param_norms_every=2) as history:
        wanted = []
        for _ in range(4):
            wanted.append(history.wants_param_norms)
            history.record(report(1.0))
    assert wanted == [True, False, True, False]  # as on rank 0: it decides the size of a collective
    assert history.step == 4
    assert not (tmp_path / "run.jsonl").exists()
    assert not logged


def test_not_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("import torch\n")
    with pytest.raises(ValueError, match=r"model\.py is no history"):
        History(path).record(report(1.0))
    assert path.read_text() == "import torch\n"
    with pytest.raises(OSError, match="mon_missing"):
        History(tmp_path / "mon_missing" / "run.jsonl").record(report(1.0))


def test_sinks(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.seen.append((tag, scalar_value, global_step))

    writer, logged = Writer(), list[dict[str, Any]]()
    with History(None, to=[writer, logged.append], block=2) as history:
        history.record(report(4.0), loss=2.0)
    assert ("clip/coefficient", 0.25, 1) in writer.seen
    assert ("clip/loss", 2.0, 1) in writer.seen
    assert logged[0] == {
        "step": 1, "total_norm": 4.0, "threshold": 1.0, "coefficient": 0.25, "clipped": True,
        "skipped": False, "nonfinite": False, "loss": 2.0,
    }  # fmt: skip


def test_nowhere_to_go() -> None:
    history = History(None, block=2)
    assert history.wants_param_norms  # as on a rank that was given a destination: no rank may ask for less
    with counting_reads() as reads:
        for _ in range(5):
            history.record(report(1.0))
    assert reads == []
    assert history.step == 5


def test_param_norms_by_module(tmp_path: Path) -> None:
    each = report(5.0)
    object.__setattr__(each, "_parameter_names", ("a.0.weight", "a.0.bias", "a.1.weight", "b"))
    object.__setattr__(each, "_parameter_norms", torch.tensor([3.0, 4.0, 1.0, 2.0]))
    for depth, names, norms in (
        (None, ["a.0.weight", "a.0.bias", "a.1.weight", "b"], [3, 4, 1, 2]),
        (2, ["a.0", "a.1", "b"], [5, 1, 2]),
    ):
        path = tmp_path / f"{depth}.jsonl"
        with History(path, param_norms_every=2, module_depth=depth) as history:
            for _ in range(3):
                history.record(each)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["names"] for line in lines if "names" in line] == [names]
        assert [line.get("param_norms") for line in lines if "step" in line] == [norms, None, norms]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block=0"):
        History(tmp_path / "run.jsonl", block=0)
    history = History(tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match="expected one number"):
        history.record(report(1.0), loss=torch.ones(3))


def test_needs_torch_alone() -> None:
    program = (
        "import sys, distclip; from distclip.monitor import History\n"
        "print([m for m in ('orjson', 'plotly', 'typer', 'rich', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@on_ranks(2)
def test_a_destination_on_rank_0_alone(rank: int) -> list[float]:
    """The message of a step has the same length on every rank, wherever the history goes."""
    seen: list[dict[str, Any]] = []
    history = distclip.History(None, to=[seen.append] if rank == 0 else [], param_norms_every=2)
    named = [(name, nn.Parameter(torch.ones(3, 2))) for name in "abc"]
    for _, parameter in named:
        distclip.declare(parameter, sharded_over=dist.group.WORLD)
    clipper = distclip.Clipper(named, distclip.GlobalNorm(1.0))
    norms = []
    for step in range(5):
        for _, parameter in named:
            parameter.grad = torch.full((3, 2), 1.0 + rank + step)
        report = clipper.clip(param_norms=history.wants_param_norms)
        history.record(report)
        norms.append(report.total_norm.item())
    history.close()
    assert len([d for d in seen if "step" in d]) >= (5 if rank == 0 else 0)
    return norms
