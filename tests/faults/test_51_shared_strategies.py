"""51: one strategy object in two clippers would feed one history with the norms of both."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import Chain, Clipper, GlobalNorm, Percentile, SkipSpikes, Warmup, ZClip
from distclip.integrations.accelerate import install
from tests.harness import on_ranks
from tests.integrations.accelerators import accelerator

SAYS = "has been used by another Clipper, which is still alive: both would feed one history"


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def backward(model: nn.Module, factor: float = 1.0) -> nn.Module:
    model.zero_grad()
    (model(torch.ones(2, 4)).square().sum() * factor).backward()
    return model


def clip(model: nn.Module, strategy: distclip.Strategy, way: str = "clip") -> Clipper:
    clipper = Clipper(backward(model), strategy)
    if way == "clip":
        clipper.clip()
    else:
        clipper.step(torch.optim.SGD(model.parameters(), 0.0))
    return clipper


Pair = Callable[[], tuple[distclip.Strategy, distclip.Strategy]]


def same(make: Callable[[], distclip.Strategy]) -> Pair:
    def pair() -> tuple[distclip.Strategy, distclip.Strategy]:
        strategy = make()
        return strategy, strategy

    return pair


def within(wrap: Callable[[Any], Any], other: Callable[[Any], Any], make: Callable[[], Any] = ZClip) -> Pair:
    def pair() -> tuple[distclip.Strategy, distclip.Strategy]:
        strategy = make()
        return wrap(strategy), other(strategy)

    return pair


def alone(s: Any) -> Any:
    return s


def chained(s: Any) -> Any:
    return Chain(s, GlobalNorm(1.0))


def chained_last(s: Any) -> Any:
    return Chain(SkipSpikes(), s)


def nested(s: Any) -> Any:
    return Chain(GlobalNorm(5.0), Chain(s, GlobalNorm(1.0)))


SHARED: dict[str, Pair] = {
    "ZClip": same(ZClip),
    "Percentile": same(Percentile),
    "SkipSpikes": same(SkipSpikes),
    "AdaGC": same(distclip.AdaGC),
    "a schedule": same(lambda: GlobalNorm(lambda step: 1.0 + step)),
    "a Chain": same(lambda: chained(ZClip())),
    "in a Chain, then alone": within(chained, alone),
    "alone, then in a Chain": within(alone, chained),
    "in two Chains": within(chained, chained_last),
    "deep in a Chain": within(nested, chained),
    "deep in both": within(nested, nested, SkipSpikes),
}


@pytest.mark.parametrize("way", ["clip", "step"])
@pytest.mark.parametrize("kind", SHARED)
def test_51_refused(kind: str, way: str) -> None:
    """Before anything is changed; the first one goes on."""
    one, other = SHARED[kind]()
    models = [net(), net(1)]
    first = clip(models[0], one, way)
    second = Clipper(backward(models[1]), other)
    before = [p.grad.clone() for p in models[1].parameters()]  # type: ignore[union-attr]
    state = copy.deepcopy(one.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=SAYS) as caught:
            second.clip() if way == "clip" else second.step(torch.optim.SGD(models[1].parameters(), 0.0))
    assert "copy.deepcopy(strategy)" in str(caught.value)
    assert all(torch.equal(p.grad, g) for p, g in zip(models[1].parameters(), before, strict=True))  # type: ignore[arg-type]
    assert str(one.state_dict()) == str(state)
    backward(models[0])
    first.clip()


ALLOWED: dict[str, Pair] = {
    "without state": same(lambda: GlobalNorm(1.0)),
    "Value": same(lambda: distclip.Value(1.0)),
    "a Chain without state": same(lambda: Chain(distclip.Value(1.0), GlobalNorm(1.0))),
    "deep copies": within(alone, copy.deepcopy),
    "pickled": within(alone, lambda s: pickle.loads(pickle.dumps(s))),
    "one of its own": lambda: (ZClip(), ZClip()),
    "a copy in a Chain": within(chained, lambda s: chained(copy.deepcopy(s))),
    "a Chain around what has no state": within(chained, lambda s: GlobalNorm(1.0)),
    "loaded": within(alone, lambda s: _loaded(s)),
}


def _loaded(strategy: Any) -> Any:
    other = type(strategy)()
    other.load_state_dict(strategy.state_dict())
    return other


@pytest.mark.parametrize("kind", ALLOWED)
def test_51_allowed(kind: str) -> None:
    one, other = ALLOWED[kind]()
    models = [net(), net(1)]
    clippers = [Clipper(m, s) for m, s in zip(models, (one, other), strict=True)]
    for _ in range(3):
        for model, clipper in zip(models, clippers, strict=True):
            backward(model)
            clipper.clip()


def test_51_copies_of_a_used_one_are_free() -> None:
    one = ZClip()
    first = clip(net(), one)
    copies = [copy.deepcopy(one), copy.copy(one).__class__(), pickle.loads(pickle.dumps(one))]
    keep = [clip(net(i), s) for i, s in enumerate(copies)]
    assert len(keep) + bool(first) == 4


@pytest.mark.parametrize("cyclic", [False, True])
def test_51_a_dead_clippers_strategy(cyclic: bool) -> None:
    """It goes on from its state, also where the old clipper is garbage that has not been collected yet."""
    strategy = ZClip()
    first: Any = clip(net(), strategy)
    gc.collect()
    gc.disable()
    try:
        if cyclic:
            first.me = first
        del first
        clip(net(1), strategy)
    finally:
        gc.enable()


def test_51_only_described_or_never_used() -> None:
    strategy = ZClip()
    first = Clipper(net(), strategy)
    str(first.describe())
    second = clip(net(1), strategy)
    backward(net())
    with pytest.raises(ValueError, match=SAYS):
        first.clip()
    assert second.steps == 0


def test_51_one_clipper_for_both_models() -> None:
    """The remedy where one history is meant."""
    models = [backward(net()), backward(net(1))]
    clipper = Clipper(models, ZClip())
    for _ in range(3):
        for model in models:
            backward(model)
        clipper.clip()


def test_51_the_same_twice_in_one_chain() -> None:
    strategy = ZClip()
    with pytest.raises(ValueError, match="twice"):
        Chain(strategy, strategy)


def test_51_accelerate() -> None:
    """Two models of one script, and the same installed anew."""
    strategy = ZClip()
    with accelerator("single") as first:
        install(first, strategy)
        models = [first.prepare_model(net()), net(1)]
        first.prepare_optimizer(torch.optim.SGD(models[0].parameters(), 0.0))
        backward(models[0])
        first.clip_grad_norm_(models[0].parameters(), 1.0)
        with pytest.raises(ValueError, match=SAYS):
            clip(models[1], strategy)


@pytest.mark.parametrize("kind", ["ZClip", "in two Chains"])
@on_ranks(2)
def test_51_on_every_rank(rank: int, kind: str) -> str:
    one, other = SHARED[kind]()
    first = clip(DDP(net()), one)
    second = Clipper(backward(DDP(net(1))), other)
    with pytest.raises(ValueError, match=SAYS) as caught:
        second.clip()
    assert first.steps == 0
    return str(caught.value)


def test_51_warmup_of_one() -> None:
    """A schedule counts steps: it too has a history."""
    threshold = GlobalNorm(Warmup(10.0, 1.0, steps=5))
    first = clip(net(), threshold)
    with pytest.raises(ValueError, match=SAYS):
        clip(net(1), threshold)
    assert first.steps == 0
