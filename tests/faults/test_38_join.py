"""38: torch's ``Join``: a rank that has run out of batches takes part in DDP's messages and in no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests import oracle
from tests.harness import on_ranks

BOUND = 1e-3


def net() -> DDP:
    torch.manual_seed(0)
    return DDP(nn.Linear(4, 4))


def train(model: DDP, batches: int, clip: Callable[[torch.optim.Optimizer], Any], **options: Any) -> int:
    opt = torch.optim.SGD(model.parameters(), 0.1)
    done = 0
    with Join([model], **options):
        for i in range(batches):
            opt.zero_grad()
            model(torch.full((2, 4), i + 1.0)).square().sum().backward()
            want = oracle.norm(oracle.dense_gradients(model.parameters()))
            assert clip(opt).item() == pytest.approx(want, rel=1e-5)
            done += 1
    return done


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("way", ["clip", "step", "function"])
@on_ranks(2)
def test_38_norms_are_right(rank: int, way: str, overlap: bool) -> list[float]:
    """Twelve steps on one rank, seven on the other, and again: the calls at which copies are compared do not
    come apart. Afterwards all ranks hold the same."""
    model = net()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND), overlap=overlap)

    def clip(opt: torch.optim.Optimizer) -> Any:
        if way == "step":
            return clipper.step(opt).total_norm
        norm = clipper.clip().total_norm if way == "clip" else distclip.clip_grad_norm_(model, BOUND)
        opt.step()
        return norm

    for _ in range(2):
        assert train(model, 7 if rank else 12, clip) == (7 if rank else 12)
    return [round(float(p.sum()), 5) for p in model.parameters()]


STRATEGIES: dict[str, tuple[Callable[[], distclip.Strategy], dict[str, Any], str]] = {
    "loss": (lambda: distclip.SkipSpikes(use_loss=True), {"loss": 1.0}, "would wait for it"),
    "loss in a Chain": (
        lambda: distclip.Chain(distclip.SkipSpikes(use_loss=True), distclip.GlobalNorm(1.0)),
        {"loss": 1.0},
        "would wait for it",
    ),
    "history": (distclip.ZClip, {}, "ZClip keeps a history of"),
    "schedule": (lambda: distclip.GlobalNorm(lambda step: 1.0 + step), {}, "keeps a history of"),
}


@pytest.mark.parametrize("way", ["clip", "step"])
@pytest.mark.parametrize("name", STRATEGIES)
@on_ranks(2)
def test_38_explained_on_every_rank(rank: int, name: str, way: str) -> str:
    """In the first step, when all are still there."""
    strategy, kwargs, says = STRATEGIES[name]
    model = net()
    clipper = distclip.Clipper(model, strategy())

    def clip(opt: torch.optim.Optimizer) -> Any:
        return (clipper.clip(**kwargs) if way == "clip" else clipper.step(opt, **kwargs)).total_norm

    with pytest.raises(ValueError, match=says) as caught:
        train(model, 1 if rank else 3, clip)
    assert "throw_on_early_termination=True" in str(caught.value)
    return str(caught.value)


@on_ranks(2)
def test_38_weights_of_micro_batches(rank: int) -> None:
    model = net()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    with Join([model]), clipper.accumulate(1) as micro:
        micro.backward(model(torch.ones(2, 4)).sum(), weight=3)
    with pytest.raises(ValueError, match="would wait for it"):
        clipper.clip()


@pytest.mark.parametrize("name", ["loss", "history"])
@on_ranks(2)
def test_38_with_an_early_end(rank: int, name: str) -> int:
    """torch then raises on all ranks as soon as one has no batch: nothing is in the way before."""
    strategy, kwargs, _ = STRATEGIES[name]
    model = net()
    clipper = distclip.Clipper(model, strategy())
    done: list[float] = []

    def clip(opt: torch.optim.Optimizer) -> Any:
        report = clipper.step(opt, **kwargs)
        done.append(report.total_norm.item())
        return report.total_norm

    with pytest.raises(RuntimeError, match=r"exhausted all inputs|Detected at least one rank"):
        train(model, 3 if rank else 6, clip, throw_on_early_termination=True)
    return len(done)
