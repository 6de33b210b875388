"""52: a new Clipper in every step plans in every step, and never learns: said once, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import Chain, Clipper, GlobalNorm, Percentile, ZClip
from tests.harness import on_ranks

SAYS = "Make it once, before the loop: clipper = distclip.Clipper(model, strategy)"
STEPS = 12


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()


def in_the_loop(model: nn.Module, step: int) -> None:
    Clipper(model, Percentile()).clip()


def in_a_function(model: nn.Module, step: int) -> None:
    def clip(parameters: Any, max_norm: float) -> Any:
        clipper = Clipper(parameters, GlobalNorm(max_norm))
        return clipper.clip().total_norm

    clip(model.parameters(), 1.0)


def in_turn(model: nn.Module, step: int) -> None:
    strategies: list[Callable[[], distclip.Strategy]] = [ZClip, Percentile, lambda: GlobalNorm(1.0)]
    Clipper(model, strategies[step % 3]()).clip()


def of_a_list(model: nn.Module, step: int) -> None:
    Clipper(list(model.named_parameters()), ZClip()).clip()


def of_the_optimizer(model: nn.Module, step: int) -> None:
    opt = torch.optim.SGD(model.parameters(), 0.0)
    Clipper(opt, ZClip()).step(opt)


def with_overlap(model: nn.Module, step: int) -> None:
    Clipper(model, ZClip(), overlap=True).clip()


def kept(model: nn.Module, step: int) -> None:
    """None of them dies."""
    everyone: list[Any] = model.__dict__.setdefault("clippers", [])
    everyone.append(Clipper(model, Chain(ZClip(), GlobalNorm(1.0))))
    everyone[-1].clip()


MISTAKES = [in_the_loop, in_a_function, in_turn, of_a_list, of_the_optimizer, with_overlap, kept]


@pytest.mark.parametrize("way", MISTAKES, ids=lambda f: f.__name__)
def test_52_said_once(way: Callable[[nn.Module, int], None], caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    for step in range(STEPS):
        backward(model)
        way(model, step)
    assert [SAYS in record.getMessage() for record in caplog.records] == [True]
    assert "made anew in every step" in caplog.text


def many_models(step: int) -> None:
    for seed in range(10):
        model = net(seed)
        backward(model)
        Clipper(model, ZClip()).clip()


def one_for_an_epoch(step: int) -> None:
    model = net()
    for _ in range(8):
        clipper = Clipper(model, ZClip())
        for _ in range(3):
            backward(model)
            clipper.clip()


def several_of_one_model(step: int) -> None:
    """One for each of its uses, all of which last."""
    model = net()
    clippers = [Clipper(model, ZClip()) for _ in range(8)]
    for _ in range(3):
        for clipper in clippers:
            backward(model)
            clipper.clip()


def tried_twice(step: int) -> None:
    """A notebook's cell."""
    model = net()
    for _ in range(3):
        backward(model)
        Clipper(model, ZClip()).clip()


def beside_another(step: int) -> None:
    """A short-lived one for a look, between the steps of one that stays."""
    model = net()
    clipper = Clipper(model, ZClip())
    for _ in range(8):
        backward(model)
        clipper.clip()
        Clipper(model, GlobalNorm(1e9)).describe()


def functions(step: int) -> None:
    model = net()
    for _ in range(8):
        backward(model)
        distclip.clip_grad_norm_(model.parameters(), 1.0)
        distclip.total_grad_norm(model)


LEGIT = [many_models, one_for_an_epoch, several_of_one_model, tried_twice, beside_another, functions]


@pytest.mark.parametrize("use", LEGIT, ids=lambda f: f.__name__)
def test_52_what_is_meant_so(use: Callable[[int], None], caplog: pytest.LogCaptureFixture) -> None:
    use(0)
    assert not caplog.records


@on_ranks(2)
def test_52_on_two_ranks(rank: int) -> None:
    """And right all the same."""
    model = DDP(net())
    for _ in range(6):
        backward(model)
        assert Clipper(model, GlobalNorm(1e-3)).clip().clipped_norm.item() == pytest.approx(1e-3, rel=1e-3)
