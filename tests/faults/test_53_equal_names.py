"""53: parameters that are called alike are told apart, alike on every rank, and stay so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distclip
from tests.harness import on_ranks
from tests.layouts import mesh1


def two(shard: bool = False) -> list[nn.Linear]:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    return [fully_shard(m, mesh=mesh1(2)) for m in models] if shard else models  # type: ignore[misc]


def both(models: list[nn.Linear]) -> list[tuple[str, Tensor]]:
    return [pair for m in models for pair in m.named_parameters()]


def by_optimizer(models: list[nn.Linear]) -> Any:
    """Named parameters in several groups, where names need only differ within one."""
    try:
        return torch.optim.SGD([{"params": list(m.named_parameters())} for m in models], lr=0.1)
    except ValueError:  # some releases want all names different
        return both(models)


def fill(models: list[nn.Linear]) -> list[float]:
    """The gradients' norms: 1, 2, 3, 4."""
    norms = []
    for i, (_, p) in enumerate(both(models)):
        p.grad = torch.full_like(p, (i + 1) / math.sqrt(p.numel()))
        norms.append(float(i + 1))
    return norms


WANT = ["weight", "bias", "weight#2", "bias#2"]
SOURCES: dict[str, Callable[[list[nn.Linear]], Any]] = {
    "list": both,
    "tuple": lambda models: tuple(both(models)),
    "generator": lambda models: (pair for pair in both(models)),
    "optimizer": by_optimizer,
}


def check(models: list[nn.Linear], source: Any) -> None:
    norms = fill(models)
    clipper = distclip.Clipper(source, distclip.PerParameter(1e9))
    report = clipper.clip(param_norms=True)
    assert list(report.param_norms) == WANT
    assert [v.item() for v in report.param_norms.values()] == pytest.approx(norms)
    assert all(name in str(clipper.describe()) for name in WANT)


@pytest.mark.parametrize("source", SOURCES)
def test_53_reports(source: str) -> None:
    models = two()
    check(models, SOURCES[source](models))


@pytest.mark.parametrize("shard", [False, True])
@on_ranks(2)
def test_53_reports_on_ranks(rank: int, shard: bool) -> None:
    torch.manual_seed(0)
    for source in SOURCES.values():
        models = two(shard)
        check(models, source(models))


def test_53_names_that_are_taken() -> None:
    """A user's own ``weight#2`` is not taken for a second ``weight``."""
    tensors = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    names = ["weight", "weight#2", "weight", "weight", "weight#2"]
    for p in tensors:
        p.grad = torch.ones(2)
    clipper = distclip.Clipper(list(zip(names, tensors, strict=True)), distclip.PerParameter(1.0))
    clipper.clip()
    assert len(set(clipper.plan.names)) == 5
    assert clipper.plan.names[:2] == ("weight", "weight#2")


@pytest.mark.parametrize("param_norms", [False, True])
def test_53_patterns_fit_all_of_the_name_or_one(param_norms: bool) -> None:
    models = two()
    fill(models)
    strategy = distclip.PerGroup({"weight#2": 0.5, "*weight": 0.1, "bias": 0.2})
    report = distclip.Clipper(both(models), strategy).clip(param_norms=param_norms)
    after = [p.grad.norm().item() for _, p in both(models) if p.grad is not None]
    shares = [0.1, 0.2 * 2 / math.sqrt(2**2 + 4**2), 0.5, 0.2 * 4 / math.sqrt(2**2 + 4**2)]
    assert after == pytest.approx(shares, rel=1e-4)
    if param_norms:
        assert [v.item() for v in report.param_norms.values()] == pytest.approx([1, 2, 3, 4])


@pytest.mark.parametrize("param_norms", [False, True])
@on_ranks(2)
def test_53_stages(rank: int, param_norms: bool) -> list[str]:
    """The names of every stage are those of its own module; a pattern is about all of them."""
    models = [nn.Linear(2, 2)]
    for p in models[0].parameters():
        p.grad = torch.full_like(p, (1.0 + rank) / math.sqrt(p.numel()))
    strategy = distclip.PerGroup({"weight": 0.1, "bias": 0.2})
    clipper = distclip.Clipper(both(models), strategy, stages=dist.group.WORLD)
    report = clipper.clip(param_norms=param_norms)
    share = (1 + rank) / math.sqrt(5)
    assert models[0].weight.grad.norm().item() == pytest.approx(0.1 * share, rel=1e-4)  # type: ignore[union-attr]
    assert models[0].bias.grad.norm().item() == pytest.approx(0.2 * share, rel=1e-4)  # type: ignore[union-attr]
    if param_norms:
        assert [v.item() for v in report.param_norms.values()] == pytest.approx([1, 1, 2, 2])
    return list(clipper.plan.names)


# --- what has been learned goes on by name --------------------------------------------------------------


def learned(clipper: distclip.Clipper) -> dict[str, float]:
    state: Any = clipper.strategy.get_extra_state()
    return dict(zip(state["names"], state["average"], strict=True))


def adagc(source: Any, **kwargs: Any) -> distclip.Clipper:
    return distclip.Clipper(source, distclip.AdaGC(warmup=1, max_norm=1e9), **kwargs)


def test_53_state_round_trip() -> None:
    models = two()
    clipper = adagc(both(models))
    fill(models)
    clipper.clip()
    assert learned(clipper) == pytest.approx({"weight": 1, "bias": 2, "weight#2": 3, "bias#2": 4})
    again = adagc(both(two()))
    again.load_state_dict(clipper.state_dict())
    assert again.plan.names == clipper.plan.names
    assert learned(again) == learned(clipper)


REMOVED: dict[str, tuple[Callable[[list[Any]], Any], dict[str, float]]] = {
    "the first": (lambda s: s.__delitem__(slice(0, 2)), {"weight#2": 3, "bias#2": 4}),
    "the second": (lambda s: s.__delitem__(slice(2, 4)), {"weight": 1, "bias": 2}),
    "one of the first": (lambda s: s.__delitem__(0), {"bias": 2, "weight#2": 3, "bias#2": 4}),
    "turned round": (lambda s: s.reverse(), {"bias#2": 4, "weight#2": 3, "bias": 2, "weight": 1}),
    "the first replaced": (
        lambda s: s.__setitem__(0, ("weight", nn.Parameter(torch.ones(2, 2)))),
        {"weight": 1, "bias": 2, "weight#2": 3, "bias#2": 4},  # by name
    ),
    "a third": (
        lambda s: s.insert(0, ("weight", nn.Parameter(torch.ones(2, 2)))),
        {"weight#3": math.inf, "weight": 1, "bias": 2, "weight#2": 3, "bias#2": 4},
    ),
}


def change(source: list[Any], kind: str) -> dict[str, float]:
    REMOVED[kind][0](source)
    return REMOVED[kind][1]


@pytest.mark.parametrize("kind", REMOVED)
def test_53_planned_anew(kind: str) -> None:
    models = two()
    source = both(models)
    clipper = adagc(source)
    fill(models)
    clipper.clip()
    want = change(source, kind)
    assert dict.fromkeys(clipper.plan.names) == dict.fromkeys(want)
    assert learned(clipper) == pytest.approx(want)
    report = clipper.clip(param_norms=True)
    assert list(report.param_norms) == list(want)


def test_53_frozen_ones_have_names_too() -> None:
    """So that what trains does not decide what the others are called."""
    models = two()
    models[0].requires_grad_(False)
    clipper = adagc(both(models))
    assert list(clipper.plan.names) == WANT[2:]
    models[0].requires_grad_()
    assert list(clipper.plan.names) == WANT


@pytest.mark.parametrize("kind", ["the first", "the second", "turned round"])
@on_ranks(2)
def test_53_planned_anew_on_ranks(rank: int, kind: str) -> None:
    torch.manual_seed(0)
    for shard in (False, True):
        models = two(shard)
        source = both(models)
        clipper = adagc(source)
        fill(models)
        clipper.clip()
        want = change(source, kind)
        assert list(clipper.plan.names) == list(want)
        assert learned(clipper) == pytest.approx(want)


@on_ranks(2)
def test_53_a_stage_that_loses_its_first(rank: int) -> None:
    """The other stage's keeps its name, and its average."""
    models = two()
    for p in (q for m in models for q in m.parameters()):
        p.requires_grad_()
    source = both(models) if rank == 0 else both(models[:1])
    clipper = adagc(source, stages=dist.group.WORLD)
    for i, (_, p) in enumerate(source):
        p.grad = torch.full_like(p, (i + 1 + 4 * rank) / math.sqrt(p.numel()))
    clipper.clip()
    assert learned(clipper) == pytest.approx(
        {"weight": 1, "bias": 2, "weight#2": 3, "bias#2": 4, "weight#3": 5, "bias#3": 6}
    )
    if rank == 0:
        del source[:2]
    clipper = _again(clipper)
    assert clipper.plan.names[-2:] == ("weight#3", "bias#3")
    assert learned(clipper) == pytest.approx({"weight#2": 3, "bias#2": 4, "weight#3": 5, "bias#3": 6})


def _again(clipper: distclip.Clipper) -> distclip.Clipper:
    """Planned anew on both ranks, as where both have changed."""
    clipper._clipping.parameters._read = None
    return clipper
