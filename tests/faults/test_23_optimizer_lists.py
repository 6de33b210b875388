"""23: an optimizer whose groups are changed in place, behind its back or by its own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from tests import oracle
from tests.faults.ways import BOUND, CLIPPERS, Way, assert_right, fill
from tests.harness import on_ranks


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def head(m: nn.Sequential) -> nn.Linear:
    m[1] = nn.Linear(4, 4)
    return m[1]


def group(o: torch.optim.Optimizer, i: int = 0) -> list[Any]:
    found: list[Any] = o.param_groups[i]["params"]
    return found


def in_place(m: Any, o: Any) -> None:
    new = head(m)
    group(o)[2:4] = [new.weight, new.bias]


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "another list of the same length": lambda m, o: (
        head(m),
        o.param_groups[0].__setitem__("params", list(m.parameters())),
    ),
    "in place": in_place,
    "add_param_group": lambda m, o: o.add_param_group({"params": m.append(nn.Linear(2, 2))[3].parameters()}),
    "append": lambda m, o: group(o).append(m.append(nn.Linear(2, 2, bias=False))[3].weight),
    "pop": lambda m, o: (group(o).pop(), m[2].register_parameter("bias", None)),
    "param_groups replaced": lambda m, o: (
        head(m),
        setattr(o, "param_groups", [{**o.param_groups[0], "params": list(m.parameters())}]),
    ),
    "a group removed": lambda m, o: (
        o.param_groups.append({**o.param_groups[0], "params": group(o)[4:]}),
        group(o).__delitem__(slice(4, None)),
        o.param_groups.pop(),
        m[2].requires_grad_(False),
    ),
    "groups split": lambda m, o: (
        o.param_groups.append({**o.param_groups[0], "params": group(o)[2:]}),
        group(o).__delitem__(slice(2, None)),
    ),
    "in another order": lambda m, o: group(o).reverse(),
    "load_state_dict": lambda m, o: o.load_state_dict(o.state_dict()),
    "frozen": lambda m, o: m[0].requires_grad_(False),
    "frozen and back": lambda m, o: (m[0].requires_grad_(False), m[0].requires_grad_(True)),
}


def build() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = mlp()
    return model, torch.optim.SGD(list(model.parameters()), lr=1.0)


def run(kind: str, way: str) -> None:
    model, optimizer = build()
    clip = Way(way, model, source=optimizer)
    for step in range(2):
        fill(model, seed=step)
        assert_right(clip, model)
    CHANGES[kind](model, optimizer)
    for step in range(2):
        fill(model, 50.0, seed=step)
        before = [p.detach().double().clone() for p in model.parameters()]
        assert_right(clip, model)
        moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
        if way.startswith("step"):  # the update itself is clipped
            assert oracle.norm(moved) == pytest.approx(BOUND, rel=2e-2)


@pytest.mark.parametrize("way", [*CLIPPERS, "function", "list"])
@pytest.mark.parametrize("kind", CHANGES)
def test_23_the_optimizer_is_the_source(kind: str, way: str) -> None:
    run(kind, way)


@pytest.mark.parametrize("way", ["clip", "step", "function"])
@pytest.mark.parametrize("kind", CHANGES)
@on_ranks(2)
def test_23_of_replicas(rank: int, kind: str, way: str) -> None:
    run(kind, way)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("overlap", [False, True])
def test_23_the_model_is_the_source(kind: str, overlap: bool) -> None:
    """And the optimizer steps what the clipper knows, or it is an error."""
    model, optimizer = build()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND), overlap=overlap)
    for step in range(2):
        fill(model, seed=step)
        clipper.step(optimizer)
    CHANGES[kind](model, optimizer)
    for step in range(2):
        fill(model, 50.0, seed=step)
        assert_right(lambda: clipper.step(optimizer).total_norm, model)


@pytest.mark.parametrize("overlap", [False, True])
def test_23_an_optimizer_of_others_is_refused(overlap: bool) -> None:
    model, optimizer = build()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND), overlap=overlap)
    fill(model)
    clipper.step(optimizer)
    stray = nn.Parameter(torch.ones(3))
    optimizer.param_groups[0]["params"][0] = stray
    fill(model)
    stray.grad = torch.ones(3)
    before = stray.detach().clone()
    with pytest.raises(ValueError, match="parameter"):
        clipper.step(optimizer)
    assert torch.equal(stray, before)
