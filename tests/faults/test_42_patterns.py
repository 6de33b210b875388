"""Failure 42: a pattern or group that fits no parameter is an error that names it, and nothing is clipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import AGC, Chain, GlobalNorm, PerGroup, Strategy, Value
from tests.harness import on_ranks

# The strategy, and what the error has to say.
MISSES: dict[str, tuple[Callable[[], Strategy], str]] = {
    "another name": (lambda: PerGroup({"head.*": 1.0}), r"'head\.\*' fits none of the 4"),
    "one of two": (lambda: PerGroup({"0.*": 1.0, "encoder.*": 2.0}), r"'encoder\.\*' fits none"),
    "a prefix that wrappers add": (lambda: PerGroup({"module.0.*": 1.0}), r"'module\.0\.\*' fits none"),
    "a regular expression": (lambda: PerGroup({r"0\..*": 1.0, "*": 1.0}), "fits none"),
    "another case": (lambda: PerGroup({"0.Weight": 1.0}), r"'0\.Weight' fits none.*Case counts"),
    "empty": (lambda: PerGroup({"": 1.0}), r"'' fits none"),
    "a part of a name": (lambda: PerGroup({"weight": 1.0}), r"'weight' fits none.*0\.weight, 0\.bias"),
    "a group without an optimizer": (lambda: PerGroup({1: 1.0}), r"1 is the index of no .*group 0"),
    "a group and a pattern": (lambda: PerGroup({"*.bias": 1.0, 3: 1.0}), "3 is the index of no"),
    "a negative group": (lambda: PerGroup({-1: 1.0}), "-1 is the index of no parameter group"),
    "AGC": (lambda: AGC(exclude=("head.*",)), r"AGC\(exclude=\.\.\.\): the pattern 'head\.\*' fits none"),
    "AGC, one of two": (lambda: AGC(exclude=("2.*", "fc")), r"'fc' fits none"),
    "AGC, one string": (lambda: AGC(exclude="classifier"), r"'classifier' fits none"),
    "inside a chain": (
        lambda: Chain(GlobalNorm(1.0), PerGroup({"head.*": 1.0}), Value(1.0)), r"'head\.\*' fits none",
    ),
}  # fmt: skip
FITS: dict[str, Callable[[], Strategy]] = {
    "names": lambda: PerGroup({"0.weight": 1.0, "2.bias": 1.0}),
    "patterns": lambda: PerGroup({"[02].w*": 1.0, "*.bias": 2.0}),
    "one that only fits what an earlier one takes": lambda: PerGroup({"*": 1.0, "*.bias": 0.1}),
    "group 0": lambda: PerGroup({0: 1.0}),
    "AGC": lambda: AGC(exclude=("2.*",)),
    "AGC without": lambda: AGC(),
}
ENTRANCES = ("clip", "step", "plan")


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    made(torch.ones(2, 3)).square().sum().backward()
    return made


def enter(clipper: distclip.Clipper, net: nn.Module, entrance: str) -> object:
    if entrance == "plan":
        return clipper.plan
    return clipper.clip() if entrance == "clip" else clipper.step(torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("row", MISSES)
def test_42_what_fits_nothing_is_an_error(row: str, entrance: str) -> None:
    make, message = MISSES[row]
    net = model()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match=message):
        enter(distclip.Clipper(net, make()), net, entrance)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("row", FITS)
def test_42_what_fits_is_none(row: str, entrance: str) -> None:
    net = model()
    enter(distclip.Clipper(net, FITS[row]()), net, entrance)


@pytest.mark.parametrize("make", [lambda: PerGroup({"head.*": 1.0, 7: 1.0}), lambda: AGC(exclude="head")])
def test_42_of_no_parameters_nothing_is_asked(make: Callable[[], Strategy]) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for parameters in ([], frozen):
        assert distclip.Clipper(parameters, make()).clip().total_norm == 0


def test_42_groups_of_an_optimizer() -> None:
    net = model()
    groups = [{"params": [p]} for p in net.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    distclip.Clipper(optimizer, PerGroup({0: 1.0, 3: 1.0})).clip()
    with pytest.raises(ValueError, match=r"4 is the index of no parameter group.*0, 1, 2, 3"):
        distclip.Clipper(optimizer, PerGroup({0: 1.0, 4: 1.0})).clip()


def test_42_a_pattern_that_has_fitted_may_fit_nothing_later() -> None:
    """Its parameters may be frozen in the midst of a training, which is planned anew then."""
    strategy, net = PerGroup({"0.*": 1.0, "2.*": 1.0}), model()
    distclip.Clipper(net, strategy).clip()
    net[0].requires_grad_(False)  # type: ignore[index]
    net[0].zero_grad()  # type: ignore[index]
    distclip.Clipper(net, strategy).clip()


@pytest.mark.parametrize("staged", [False, True])
@on_ranks(2)
def test_42_every_rank_raises_the_same(rank: int, staged: bool) -> str:
    """With stages, also those whose own parameters the other patterns fit."""
    net = model()
    named = [(f"stage{rank}.{n}" if staged else n, p) for n, p in net.named_parameters()]
    fits = {"stage0.*": 1.0, "stage1.*": 1.0} if staged else {"*.bias": 1.0}
    stages = dist.group.WORLD if staged else None
    distclip.Clipper(named, PerGroup(fits), stages=stages).clip()
    with pytest.raises(ValueError, match=r"'head\.\*' fits none") as caught:
        distclip.Clipper(named, PerGroup({**fits, "head.*": 1.0}), stages=stages).clip()
    return str(caught.value)
