"""Law 9: a saved state continues the same sequence, also on another number of ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distclip
from tests.harness import on_ranks
from tests.layouts import mesh1

SHAPES = {"embed.weight": (9, 4), "0.weight": (8, 3), "0.bias": (5,), "head.weight": (1, 6)}  # uneven, empty
STEPS, SAVED_AFTER = 16, 8
LEVELS = (3, 4, 3, math.nan, 3, 5, 4, 3, 4, 60, 3, 4, math.nan, 90, 3, 4)


STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "Percentile": lambda: distclip.Percentile(60, multiplier=1.1, history=5, warmup=3, initial=1.0),
    "AutoClip": lambda: distclip.Percentile(10, multiplier=1, warmup=1, history=None),
    "ZClip": lambda: distclip.ZClip(0.8, 1.5, warmup=4, max_norm=math.inf),
    "AdaGC": lambda: distclip.AdaGC(warmup=4, beta=0.7),
    "SkipSpikes": lambda: distclip.SkipSpikes(6, 2.0, min_history=4),
    "Warmup": lambda: distclip.GlobalNorm(distclip.Warmup(0.1, 3.0, steps=20)),
    "Cosine": lambda: distclip.PerParameter(distclip.Cosine(1.0, 0.1, steps=20)),
    "Chain": lambda: distclip.Chain(
        distclip.SkipSpikes(6, 9.0, min_history=4),
        distclip.AdaGC(warmup=4, beta=0.7),
        distclip.ZClip(warmup=4, max_norm=math.inf),
    ),
}


def whole_gradient(step: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    gradient = torch.randn(SHAPES[name], generator=generator) / 64
    if not math.isnan(LEVELS[step]):
        return gradient * LEVELS[step]
    gradient.view(-1)[-1] = math.nan
    return gradient


def model() -> dict[str, Tensor]:
    """Sharded over all ranks, if there are any."""
    if not dist.is_initialized():
        return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    mesh = mesh1(dist.get_world_size())
    return {
        name: nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]))
        for name, shape in SHAPES.items()
    }


def follow(clipper: distclip.Clipper, named: dict[str, Tensor], steps: Iterable[int]) -> list[list[float]]:
    """What is decided at each step."""
    decided = []
    for step in steps:
        for name, parameter in named.items():
            whole = whole_gradient(step, name)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        report = clipper.clip()
        values = [report.total_norm, report.coefficient, report.clipped, report.skipped]
        decided.append([*report.threshold.flatten().tolist(), *(float(v) for v in values)])
    return decided


def same(a: list[list[float]], b: list[list[float]]) -> bool:
    """But for the rounding of sums over other ranks, which is far less than the strategies react to."""
    return all(x == pytest.approx(y, rel=1e-6, nan_ok=True) for x, y in zip(a, b, strict=True))


@on_ranks(4)
def save_on_four(rank: int, name: str, folder: Path) -> None:
    named = model()
    clipper = distclip.Clipper(named.items(), STRATEGIES[name]())
    follow(clipper, named, range(SAVED_AFTER))
    dcp.save({"clipper": clipper.state_dict()}, checkpoint_id=folder / "dcp")
    if rank == 0:
        torch.save(clipper.state_dict(), folder / "state.pt")


def continue_from(
    name: str, folder: Path, expected: list[list[float]], *, distributed: bool, clipped: bool
) -> None:
    """``clipped``: the clipper has been at work already, and knows its parameters."""
    named = model()
    clipper = distclip.Clipper(named.items(), STRATEGIES[name]())
    if clipped:
        follow(clipper, named, range(5))
    if distributed:
        state = {"clipper": clipper.state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
        clipper.load_state_dict(state["clipper"])
    else:
        clipper.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    got = follow(clipper, named, range(SAVED_AFTER, STEPS))
    assert same(got, expected), (got, expected)


@on_ranks(2)
def continue_on_two(rank: int, name: str, folder: Path, expected: list[list[float]], clipped: bool) -> None:
    for distributed in (False, True):
        continue_from(name, folder, expected, distributed=distributed, clipped=clipped)


@pytest.mark.distributed
@pytest.mark.parametrize("name", STRATEGIES)
def test_saved_on_four_ranks_and_continued_on_two_and_on_one(name: str, tmp_path: Path) -> None:
    named = model()
    uninterrupted = follow(distclip.Clipper(named.items(), STRATEGIES[name]()), named, range(STEPS))
    rest = uninterrupted[SAVED_AFTER:]
    assert not same(follow(distclip.Clipper(named.items(), STRATEGIES[name]()), named, range(8, STEPS)), rest)

    save_on_four(name, tmp_path)
    for clipped in (False, True):
        continue_on_two(name, tmp_path, rest, clipped)
        for distributed in (False, True):
            with warnings.catch_warnings():
                # Loading without a process group is what this is about.
                warnings.filterwarnings("ignore", message=".*in a single process.*")
                continue_from(name, tmp_path, rest, distributed=distributed, clipped=clipped)


@on_ranks(2)
def continue_with_other_parameters(rank: int, folder: Path, distributed: bool) -> None:
    named = model()
    del named["0.bias"]
    mesh = mesh1(2)
    for added in ("lora_a", "lora_b"):
        named[added] = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    clipper = distclip.Clipper(named.items(), STRATEGIES["AdaGC"]())
    assert clipper.plan is not None
    if distributed:
        state = {"clipper": clipper.state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
        loaded = state["clipper"]
    else:
        loaded = torch.load(folder / "state.pt", weights_only=True)
    with pytest.warns(UserWarning, match=r"no average for lora_a, lora_b: .* has one for 0\.bias: not"):
        clipper.load_state_dict(loaded)
    averages = clipper.strategy.state_dict()["_extra_state"]
    before = torch.load(folder / "state.pt", weights_only=True)["strategy"]["_extra_state"]
    kept = dict(zip(averages["names"], [float(a) for a in averages["average"]], strict=True))
    saved = dict(zip(before["names"], [float(a) for a in before["average"]], strict=True))
    assert kept == {n: saved.get(n, math.inf) for n in named}


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [False, True], ids=["torch.save", "DCP"])
def test_adagc_survives_added_and_removed_parameters(distributed: bool, tmp_path: Path) -> None:
    save_on_four("AdaGC", tmp_path)
    continue_with_other_parameters(tmp_path, distributed)


def test_a_state_has_two_methods_and_no_device() -> None:
    """All that accelerator.register_for_checkpointing asks for; and loading moves to the clipper's device."""
    clipper = distclip.Clipper(nn.Linear(2, 2), distclip.ZClip())
    state = clipper.state_dict()
    assert callable(clipper.load_state_dict)
    assert all(not isinstance(v, Tensor) or v.device.type == "cpu" for v in state["strategy"].values())
    clipper.load_state_dict(state)
