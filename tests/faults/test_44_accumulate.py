"""44: ``accumulate`` misused: ``loss.backward()``, one inside another, two backward passes in one slot."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests import oracle
from tests.harness import on_ranks

SAYS = r"gradients came within clipper\.accumulate\(\) and not from micro\.backward"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    return model(torch.full((2, 4), seed + 1.0)).square().sum()


def clipper_of(model: nn.Module, **options: Any) -> distclip.Clipper:
    return distclip.Clipper(model, distclip.GlobalNorm(1e9), **options)


def in_the_block(clipper: distclip.Clipper, model: nn.Module, seed: int) -> None:
    with clipper.accumulate(4):
        loss(model, seed).backward()


def over_zeros(clipper: distclip.Clipper, model: nn.Module, seed: int) -> None:
    if seed == 0:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    in_the_block(clipper, model, seed)


def divided(clipper: distclip.Clipper, model: nn.Module, seed: int) -> None:
    """By whoever has read the warning, or has always done so."""
    with clipper.accumulate(4):
        (loss(model, seed) / 4).backward()


def autograd(clipper: distclip.Clipper, model: nn.Module, seed: int) -> None:
    with clipper.accumulate(4):
        torch.autograd.backward([loss(model, seed)])


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("way", [in_the_block, over_zeros, divided, autograd], ids=lambda f: f.__name__)
def test_44_one_warning(way: Callable[..., None], planned: bool) -> None:
    model = net()
    clipper = clipper_of(model)
    if planned:
        loss(model).backward()
        clipper.clip()
        model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(12):
            way(clipper, model, seed % 4)
            if seed % 4 == 3:
                want = oracle.norm(oracle.dense_gradients(model.parameters()))
                assert clipper.clip().total_norm.item() == pytest.approx(want, rel=1e-6)  # as it is
                model.zero_grad()
    assert len(caught) == 1
    assert "micro.backward(loss, scaler)" in str(caught[0].message)
    assert caught[0].category is UserWarning


@on_ranks(2)
def test_44_several_ranks_get_a_log_line(rank: int) -> float:
    """A warning that is made an error (as here) would leave the other rank waiting."""
    model = DDP(net())
    clipper = clipper_of(model)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distclip").addHandler(handler)
    try:
        for seed in range(8):
            in_the_block(clipper, model, seed)
        norm = clipper.clip().total_norm.item()
    finally:
        logging.getLogger("distclip").removeHandler(handler)
    assert ["micro.backward" in text for text in said] == ([] if rank else [True])
    return norm


def evaluates(clipper: distclip.Clipper, model: nn.Module) -> None:
    with clipper.accumulate(2) as micro:
        with torch.no_grad():
            loss(model)
        micro.backward(loss(model))


def penalty(clipper: distclip.Clipper, model: nn.Module) -> None:
    """Gradients that do not go to ``.grad``."""
    with clipper.accumulate(2) as micro:
        x = torch.ones(2, 4, requires_grad=True)
        torch.autograd.grad(model(x).sum(), [x])
        micro.backward(loss(model))


def steps_inside(clipper: distclip.Clipper, model: nn.Module) -> None:
    with clipper.accumulate(2) as micro:
        micro.backward(loss(model))
        if micro.complete:
            clipper.step(torch.optim.SGD(model.parameters(), 0.0))


def several_losses(clipper: distclip.Clipper, model: nn.Module) -> None:
    with clipper.accumulate(2) as micro:
        micro.backward(loss(model) / 2 + loss(model) / 2)


LEGIT = [evaluates, penalty, steps_inside, several_losses]


@pytest.mark.parametrize("use", LEGIT, ids=lambda f: f.__name__)
def test_44_what_is_meant_so(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """Silent, and right in every window (warnings are errors here)."""
    model = net()
    clipper = clipper_of(model)
    loss(model).backward()
    want = oracle.norm(oracle.dense_gradients(model.parameters()))
    model.zero_grad()
    for i in range(6):
        use(clipper, model)
        if i % 2:
            assert oracle.norm(oracle.dense_gradients(model.parameters())) == pytest.approx(want, rel=1e-6)
            report = clipper.clip()
            assert report.total_norm.item() == pytest.approx(want, rel=1e-6)
            model.zero_grad()
    assert not caplog.records


def test_44_one_inside_another() -> None:
    """Refused, and the outer one goes on."""
    model = net()
    clipper = clipper_of(model)
    for i in range(2):
        with clipper.accumulate(2) as micro:
            with pytest.raises(ValueError, match=r"accumulate\(\) inside clipper\.accumulate"):
                clipper.accumulate(2).__enter__()
            micro.backward(loss(model))
        assert micro.complete == (i == 1)
    norm = clipper.clip().total_norm.item()
    model.zero_grad()
    loss(model).backward()
    assert norm == pytest.approx(oracle.norm(oracle.dense_gradients(model.parameters())), rel=1e-6)


def test_44_two_clippers_at_once() -> None:
    """Each has its own window."""
    models = [net(), net()]
    clippers = [clipper_of(m) for m in models]
    for _ in range(2):
        with clippers[0].accumulate(2) as a, clippers[1].accumulate(2) as b:
            a.backward(loss(models[0]))
            b.backward(loss(models[1], 1))
    norms = [c.clip().total_norm.item() for c in clippers]
    for i, (model, norm) in enumerate(zip(models, norms, strict=True)):
        model.zero_grad()
        loss(model, i).backward()
        assert norm == pytest.approx(oracle.norm(oracle.dense_gradients(model.parameters())), rel=1e-6)


@pytest.mark.parametrize("weight", [None, 3.0])
def test_44_twice_in_one_slot(weight: float | None) -> None:
    model = net()
    clipper = clipper_of(model)
    with clipper.accumulate(2) as micro:
        micro.backward(loss(model), weight=weight)
        before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"twice in one micro-batch.*first \+ second"):
            micro.backward(loss(model), weight=weight)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outside its `with"):
        micro.backward(loss(model))
    with clipper.accumulate(2) as other:
        with pytest.raises(ValueError, match=r"outside its `with"):
            micro.backward(loss(model))
        other.backward(loss(model), weight=weight)
    norm = clipper.clip().total_norm.item()
    model.zero_grad()
    loss(model).backward()
    assert norm == pytest.approx(oracle.norm(oracle.dense_gradients(model.parameters())), rel=1e-6)
