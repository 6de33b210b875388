"""One scaler for several clippers: only the last step of an iteration updates it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import distclip
from tests import oracle
from tests.harness import on_ranks
from tests.step.spread import OPTIMIZERS, built, kind, loss_of, model

SCALE = 1024.0


class Gan:
    """Two models, whose losses go backward before either steps."""

    def __init__(self, fused: bool = False) -> None:
        self.nets: list[nn.Module] = [model(), model()]
        self.opts = [OPTIMIZERS["SGD"](net.parameters(), **kind(fused=fused)) for net in self.nets]
        self.clippers = [distclip.Clipper(net, distclip.GlobalNorm(0.5)) for net in self.nets]
        self.scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=1)

    def backward(self, which: tuple[int, ...] = (0, 1), bad: int | None = None, seed: int = 0) -> list[float]:
        """The norms of what each should see."""
        generator = torch.Generator().manual_seed(seed)
        for i in which:
            self.opts[i].zero_grad()
            x, target = torch.randn(2, 4, 8, generator=generator).unbind()
            self.scaler.scale(loss_of(self.nets[i](x), target)).backward()
            if bad == i:
                next(self.nets[i].parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        scale = self.scaler.get_scale()
        return [oracle.norm(oracle.dense_gradients(net.parameters())) / scale for net in self.nets]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["last", "own", "one with three"])
def test_41_updated_once(how: str, fused: bool) -> None:
    """As torch's own sequence: an infinity of either halves the scale once."""
    gan = Gan(fused)
    for seed, (bad, scale) in enumerate(((None, 2.0), (1, 1.0), (0, 0.5), (None, 1.0))):
        want = gan.backward(bad=bad, seed=seed)
        for i in range(2):
            last = i == 1 and how != "own"
            report = gan.clippers[i].step(gan.opts[i], gan.scaler, update=last)
            assert bool(report.nonfinite) == (bad == i)
            if bad != i:
                assert report.total_norm.item() == pytest.approx(want[i], rel=1e-5)
                assert report.clipped_norm.item() == pytest.approx(0.5, rel=1e-5)
        if how == "own":
            gan.scaler.update()
        assert gan.scaler.get_scale() == scale * SCALE


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("clipped_before", [False, True])
def test_41_without_it_is_an_error(first: int, clipped_before: bool) -> None:
    """Before anything is touched; and the gradients can still be used."""
    gan = Gan()
    if clipped_before:
        for i in range(2):
            gan.backward((i,), seed=i)
            gan.clippers[i].step(gan.opts[i], gan.scaler)
    gan.backward()
    second = 1 - first
    gan.clippers[first].step(gan.opts[first], gan.scaler)
    parameters = list(gan.nets[second].parameters())
    before = [(p.detach().clone(), p.grad.clone()) for p in parameters]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"step\(optimizer, scaler, update=False\)"):
        gan.clippers[second].step(gan.opts[second], gan.scaler)
    for p, (value, gradient) in zip(parameters, before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_41_in_turn_needs_nothing(set_to_none: bool) -> None:
    """Each backward pass after the update of the other's step, as most GANs do it."""
    gan = Gan()
    for seed in range(6):
        i = seed % 2
        gan.opts[i].zero_grad(set_to_none=set_to_none)
        want = gan.backward((i,), seed=seed)[i]
        report = gan.clippers[i].step(gan.opts[i], gan.scaler)
        assert report.total_norm.item() == pytest.approx(want, rel=1e-5)
    assert gan.scaler.get_scale() == SCALE * 2**6


def test_41_others_that_are_there() -> None:
    """Clippers of other models, with scalers of their own or with none, and such as have gone."""
    gan, other, third = Gan(), Gan(), Gan()
    gan.backward()
    other.backward()
    third.backward()
    gan.clippers[0].step(gan.opts[0], gan.scaler)
    del third
    want = other.backward()
    assert other.clippers[0].step(other.opts[0], other.scaler).total_norm.item() == pytest.approx(want[0])
    other.clippers[1].clip()


def test_41_twice_before_the_update() -> None:
    gan = Gan()
    gan.backward()
    gan.clippers[0].step(gan.opts[0], gan.scaler, update=False)
    gan.backward((0,), seed=1)
    with pytest.raises(ValueError, match="since the scale was updated"):
        gan.clippers[0].step(gan.opts[0], gan.scaler)


@pytest.mark.parametrize("row", ["ddp", "fsdp2"])
@on_ranks(2)
def test_41_on_every_rank(rank: int, row: str) -> list[Any]:
    spreads = [built(row) for _ in range(2)]
    opts = [OPTIMIZERS["SGD"](s.groups(), foreach=False) for s in spreads]
    clippers = [distclip.Clipper(s.model, distclip.GlobalNorm(0.5)) for s in spreads]
    scaler, said = GradScaler("cpu", init_scale=SCALE, growth_interval=1), []
    for update in (False, True):
        for seed, spread in enumerate(spreads):
            spread.model.zero_grad()
            spread.backward(seed, scaler.scale)
        clippers[0].step(opts[0], scaler, update=update)
        try:
            said.append(clippers[1].step(opts[1], scaler).total_norm.item())
        except ValueError as error:
            said.append(str(error)[:40])
    assert isinstance(said[0], float)
    assert isinstance(said[1], str)
    return said
