"""36: gradients that are kept in another attribute are an error that names it, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import GlobalNorm
from tests.faults.ways import WITHOUT_OVERLAP, clipping, raised
from tests.harness import on_ranks
from tests.layouts import mesh1

ATTRIBUTES = ["main_grad", "decoupled_grad"]


def model(attribute: str, which: str) -> nn.Module:
    """Gradients in .grad, but for some."""
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for i, p in enumerate(m.parameters()):
        if which == "all" or (which == "one" and i == 2):
            setattr(p, attribute, torch.ones_like(p))
        else:
            p.grad = torch.ones_like(p)
    return m


@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("way", WITHOUT_OVERLAP)
def test_36_an_error_names_it(way: str, attribute: str, which: str) -> None:
    m = model(attribute, which)
    with clipping(way, m) as clip, pytest.raises(ValueError, match=rf"its gradient in \.{attribute}"):
        clip()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("way", WITHOUT_OVERLAP)
def test_36_beside_a_gradient_it_is_nobodys_business(way: str, attribute: str) -> None:
    """Megatron's optimizer has it in both, or an empty attribute for parameters that are new."""
    m = model(attribute, "none")
    for p in m.parameters():
        setattr(p, attribute, p.grad)
    m.register_parameter("unused", nn.Parameter(torch.ones(2)))
    setattr(m.unused, attribute, None)
    with clipping(way, m) as clip:
        assert clip().item() == pytest.approx(24**0.5)


SOURCES: dict[str, Callable[[Any], Any]] = {
    "module": lambda m: m,
    "list": lambda m: list(m.parameters()),
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
}


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("who", ["all", "one"])
@on_ranks(2)
def test_36_on_every_rank(rank: int, who: str, shard: bool) -> list[str]:
    told = []
    for source in SOURCES.values():
        for attribute in ATTRIBUTES:
            torch.manual_seed(0)
            m: Any = nn.Linear(4, 4)
            if shard:
                fully_shard(m, mesh=mesh1(2))
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            if who == "all" or rank == 1:
                m.weight.grad = None
                setattr(m.weight, attribute, torch.ones_like(m.weight))
            given = source(m)
            for clip in (
                distclip.Clipper(given, GlobalNorm(1.0)).clip,
                lambda g=given: distclip.clip_grad_norm_(g, 1.0),  # type: ignore[misc]
            ):
                with pytest.raises(distclip.OwnershipError, match=rf"weight|\[0\].*\.{attribute}") as caught:
                    clip()
                told.append(str(caught.value))
    return told


@on_ranks(2)
def test_36_on_a_stage(rank: int) -> str:
    m = model("main_grad", "all" if rank else "none")
    clipper = distclip.Clipper(m, GlobalNorm(1.0), stages=dist.group.WORLD)
    with pytest.raises(distclip.OwnershipError, match=r"rank 1: ValueError: 0\.weight has .* in \.main_grad"):
        clipper.clip()
    return "on both"


@pytest.mark.parametrize("way", ["clip", "function"])
def test_36_found_later(way: str) -> None:
    """They move there after the first clip, as a stack takes over: at a power of two."""
    m = model("main_grad", "none")
    with clipping(way, m) as clip:
        clip()
        for p in m.parameters():
            p.main_grad, p.grad = p.grad, None  # type: ignore[attr-defined]
        errors = [raised(clip) for _ in range(3)]
        assert "ValueError" in errors
