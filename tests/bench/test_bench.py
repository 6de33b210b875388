"""The bench itself: that it counts right, places right, and that all contenders come to one norm."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip.bench.cases import Row, Setting, measure
from distclip.bench.contenders import CONTENDERS
from distclip.bench.counting import count
from distclip.bench.models import build, placements_of
from distclip.bench.scaling import cost, study
from distclip.bench.shapes import SHAPES, Shapes
from distclip.bench.table import text
from tests import oracle
from tests.harness import on_ranks
from tests.starting import python, run

CPU = torch.device("cpu")
TINY = Shapes("tiny", (((6, 8), (8,)), ((4, 4), (5,)), ((7, 3),)))


def test_the_shapes_are_those_that_were_promised() -> None:
    counted = {name: (make().num_tensors, make().num_elements) for name, make in SHAPES.items()}
    assert counted["small"][0] == 720
    assert counted["small"][1] == pytest.approx(13e6, rel=0.02)
    assert counted["many"][0] == 1600
    assert counted["medium"][0] == 216
    assert counted["medium"][1] == pytest.approx(63e6, rel=0.02)
    assert counted["llama"][0] == 291
    assert counted["moe"][0] == 100_000
    assert SHAPES["llama"](1.0).num_elements == pytest.approx(6.74e9, rel=0.01)  # Llama-7B


@on_ranks(4)
def test_contenders_agree_on_every_placement(rank: int) -> list[float]:
    norms = []
    for placement in placements_of(4):
        model = build(placement, TINY, CPU, torch.float32)
        for peer in ("distclip", "torch"):  # Accelerate's state would stay behind in these processes
            clip = CONTENDERS[peer](model)
            norm: Any = clip(math.inf)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            before = [g.clone() for g in model.locals]
            clip(norms[-1] / 2)
            for g, was in zip(model.locals, before, strict=True):
                torch.testing.assert_close(g, was / 2, rtol=1e-5, atol=0)
            torch._foreach_mul_(model.locals, 2.0)
        assert norms[-1] == pytest.approx(norms[-2], rel=1e-5), placement
        if "ddp" in placement:
            assert norms[-1] == pytest.approx(oracle.norm(model.locals), rel=1e-5)
    assert len(norms) == 14
    return norms


def test_bytes_are_counted() -> None:
    a, b = torch.ones(100), torch.ones(100)
    assert count(lambda: a.sum()).bytes_moved == 404
    assert count(lambda: a.add_(b)).bytes_moved == 1200
    assert count(lambda: a + b).bytes_moved == 1200
    assert count(lambda: a.copy_(b)).bytes_moved == 800
    assert count(lambda: a.view(10, 10)[3:]).bytes_moved == 0
    assert count(lambda: torch._foreach_mul_([a, b], 2.0)).bytes_moved == 1600
    assert count(lambda: a.sum().item()).host_syncs == 1


@on_ranks(2)
def test_what_is_measured(rank: int) -> list[str]:
    setting = Setting(CPU, torch.float32, rounds=3, scale=0.4, peers=("distclip", "torch"))
    rows = [*measure("medium", "fsdp2", setting)]
    by = {(row.case, row.contender): row for row in rows}
    assert by["unclipped", "distclip"].collectives == 1
    assert by["unclipped", "torch"].collectives == 2  # of torch 2.13: the all-reduce and a wait for it
    assert by["unclipped", "distclip"].passes < 1.6 < 2.9 < by["unclipped", "torch"].passes
    assert by["clipped", "distclip"].passes == pytest.approx(3, abs=0.6)
    assert {row.case for row in rows} == {"first", "unclipped", "clipped", "changing"}
    assert all(row.seconds > 0 and row.ratio > 0 for row in rows)
    assert by["unclipped", "torch"].ratio == 1
    rows += measure(
        "medium", "ddp", Setting(CPU, torch.float32, 3, 0.05, ("distclip", "torch"), ("exposed",))
    )
    assert {row.contender for row in rows if row.case == "exposed"} == {
        "torch",
        "distclip",
        "distclip, overlap",
    }
    return [f"{row.case} {row.contender}" for row in rows]


def test_the_step_of_one_process() -> None:
    setting = Setting(CPU, torch.float32, rounds=3, scale=0.05, cases=("step",))
    rows = [row for row in measure("medium", "plain", setting) if not row.note]
    assert {row.case for row in rows} == {"step", "before the step"}
    assert {row.contender for row in rows} == {"torch", "distclip", "distclip, deferred"}


def test_a_table_lines_up() -> None:
    rows = [
        Row("small", "fsdp2", "float32", "unclipped", "distclip", 0.001234, 7.0, 1.2, 1.0, 1, 1),
        Row("small", "fsdp2", "float32", "unclipped", "torch", 1.5, note=""),
        Row("small", "fsdp2", "float32", "unclipped", "megatron", note="not measured: needs CUDA"),
    ]
    lines = text(rows).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "1.23" in lines[2]
    assert "1500" in lines[3]
    assert lines[-1] == "megatron on fsdp2: not measured: needs CUDA"


def test_the_command_line(tmp_path: Path) -> None:
    """Two ranks, started by the command itself."""
    arguments = ["bench", "--ranks", "2", "--shapes", "small", "--scale", "0.1", "--rounds", "2"]
    arguments += ["--placements", "fsdp2", "--cases", "unclipped", "--json", str(tmp_path / "bench.json")]
    done = python("-m", "distclip.cli", *arguments)
    assert "| small | fsdp2" in done.stdout
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["world_size"] == 2
    assert {row["contender"] for row in saved["rows"]} >= {"distclip", "torch", "accelerate"}


def test_what_a_world_cannot_have_is_said() -> None:
    done = run(sys.executable, "-m", "distclip.bench", "--placements", "hsdp")
    assert done.returncode == 2
    assert "hsdp needs another number of ranks than 1" in done.stderr


def test_scaling_counts() -> None:
    """What is sent does not depend on the number of ranks; a step sends one number, beside five that
    tell whether any rank has changed its parameters, or is asked for something else."""
    assert not dist.is_initialized()
    few, many = cost((4, 2), 40), cost((2048, 8), 40)
    assert (few.ranks, many.ranks) == (8, 16_384)
    for c in (few, many):
        assert (c.step_collectives, c.step_bytes, c.per_parameter_bytes) == (1, 48, 360)
        assert c.plan_collectives == few.plan_collectives <= 3
        assert c.plan_bytes == few.plan_bytes
    assert "| 8 | 20 |" in study(worlds=((4, 2),), counts=(20,))
