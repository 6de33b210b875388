"""35: gradients that nobody has synchronised are an error on every rank, however the model was passed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests.faults.ways import BOUND
from tests.harness import on_ranks
from tests.layouts import mesh1, mesh2


class Wrapped:
    """A model that synchronises its gradients, unless it is told not to."""

    def __init__(self, outer: Any, inner: Any, off: Callable[[], Any]) -> None:
        self.outer, self.inner, self.off = outer, inner, off

    def backward(self, rank: int, *, synchronised: bool, factor: float = 1.0) -> None:
        with nullcontext() if synchronised else self.off():
            x = torch.full((2, 4), 1.0 + 3 * rank)
            (self.outer(x).square().sum() * factor).backward()


class toggled:
    def __init__(self, toggle: Callable[[bool], None]) -> None:
        self.toggle = toggle

    def __enter__(self) -> None:
        self.toggle(False)

    def __exit__(self, *_: object) -> None:
        self.toggle(True)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def ddp() -> Wrapped:
    inner = mlp()
    outer = DDP(inner)
    return Wrapped(outer, inner, outer.no_sync)


def composable() -> Wrapped:
    model: Any = replicate(mlp())
    return Wrapped(model, model, lambda: toggled(model.set_requires_gradient_sync))


def fsdp1() -> Wrapped:
    model = FSDP1(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    return Wrapped(model, model, model.no_sync)


def fsdp1_flat() -> Wrapped:
    model = FSDP1(mlp(), device_id=torch.device("cpu"))
    return Wrapped(model, model, model.no_sync)


def fsdp1_not_sharded() -> Wrapped:
    model = FSDP1(mlp(), device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD)
    return Wrapped(model, model, model.no_sync)


def fsdp2() -> Wrapped:
    model: Any = mlp()
    for layer in model:
        fully_shard(layer, mesh=mesh1(2))
    fully_shard(model, mesh=mesh1(2))
    return Wrapped(model, model, lambda: toggled(model.set_requires_gradient_sync))


MODELS = {f.__name__: f for f in (ddp, composable, fsdp1, fsdp1_flat, fsdp1_not_sharded, fsdp2)}
SOURCES: dict[str, Callable[[Wrapped], Any]] = {
    "wrapper": lambda w: w.outer,
    "inner": lambda w: w.inner,
    "list": lambda w: list(w.outer.parameters()),
    "named": lambda w: list(w.outer.named_parameters()),
    "optimizer": lambda w: torch.optim.SGD(w.outer.parameters(), lr=0.1),
    "in another module": lambda w: nn.ModuleDict({"inside": w.outer}),
    "in a list": lambda w: [w.outer],
}


def clips(w: Wrapped, source: Any) -> list[Callable[[], Any]]:
    """One clipper, or the drop-in."""
    clipper = distclip.Clipper(source, distclip.GlobalNorm(BOUND))
    return [clipper.clip, lambda: distclip.clip_grad_norm_(source, BOUND)]


REFUSED = (ValueError, distclip.OwnershipError)


def refused(clip: Callable[[], Any], w: Wrapped) -> None:
    before = [p.grad.clone() for p in w.outer.parameters() if p.grad is not None]
    with pytest.raises(REFUSED, match="synchronised"):
        clip()
    after = [p.grad for p in w.outer.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def passes(kind: str) -> list[str]:
    return [
        name for name in SOURCES if not (kind.startswith("fsdp1") and name in ("list", "named", "optimizer"))
    ]


@pytest.mark.parametrize("kind", MODELS)
@on_ranks(2)
def test_35_from_the_start(rank: int, kind: str) -> None:
    for name in passes(kind):
        for way in range(2):
            w = MODELS[kind]()
            clip = clips(w, SOURCES[name](w))[way]
            w.backward(rank, synchronised=False)
            refused(clip, w)


@pytest.mark.parametrize("kind", MODELS)
@on_ranks(2)
def test_35_after_a_proven_start(rank: int, kind: str) -> None:
    """At once where the wrapper tells, at a power of two otherwise."""
    for name in passes(kind):
        for way in range(2):
            w = MODELS[kind]()
            clip = clips(w, SOURCES[name](w))[way]
            for _ in range(3):
                w.outer.zero_grad()
                w.backward(rank, synchronised=True)
                clip()
            w.outer.zero_grad()
            w.backward(rank, synchronised=False)
            refused(clip, w)
            if kind != "fsdp2":  # torch keeps what it has accumulated for the next synchronised pass
                w.outer.zero_grad()
                w.backward(rank, synchronised=True)
                clip()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("last", [True, False])
@on_ranks(2)
def test_35_only_one_of_two_passes(rank: int, kind: str, last: bool) -> None:
    """Synchronised in the last: right (torch adds up what came before). Only in the first: an error."""
    for name in passes(kind):
        w = MODELS[kind]()
        clip = clips(w, SOURCES[name](w))[0]
        w.backward(rank, synchronised=not last, factor=2.0)
        w.backward(rank, synchronised=last)
        if last:
            clip()
        else:
            refused(clip, w)


@pytest.mark.parametrize("partly", [True, False])
@on_ranks(4)
def test_35_hybrid_shards(rank: int, partly: bool) -> None:
    model: Any = fully_shard(mlp(), mesh=mesh2(2, 2, "replicate", "shard"))
    toggle = model.set_requires_all_reduce if partly else model.set_requires_gradient_sync
    w = Wrapped(model, model, lambda: toggled(toggle))
    for source in (model, list(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)):
        clipper = distclip.Clipper(source, distclip.GlobalNorm(BOUND))
        model.zero_grad()
        w.backward(rank, synchronised=True)
        clipper.clip()
        model.zero_grad()
        w.backward(rank, synchronised=False)
        with pytest.raises(REFUSED, match="synchronised"):
            clipper.clip()
        w.backward(rank, synchronised=True)
        clipper.clip()


@on_ranks(4)
def test_35_hybrid_shards_of_fsdp1(rank: int) -> None:
    model = FSDP1(
        mlp(),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_mesh=mesh2(2, 2, "replicate", "shard"),
    )
    w = Wrapped(model, model, model.no_sync)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND))
    w.backward(rank, synchronised=True)
    clipper.clip()
    model.zero_grad()
    w.backward(rank, synchronised=False)
    with pytest.raises(REFUSED, match="synchronised"):
        clipper.clip()


@pytest.mark.parametrize("kind", ["ddp", "composable"])
@on_ranks(2)
def test_35_nobody_wraps_it(rank: int, kind: str) -> None:
    """The model itself called, and not what wraps it: no flag tells, only the gradients."""
    w = MODELS["ddp"]()
    clipper = distclip.Clipper(w.inner, distclip.GlobalNorm(BOUND))
    for _ in range(3):
        w.outer.zero_grad()
        w.backward(rank, synchronised=True)
        clipper.clip()
    for step in range(3, 9):
        w.outer.zero_grad()
        w.inner(torch.full((2, 4), 1.0 + 3 * rank)).square().sum().backward()
        if step in (3, 7):
            refused(clipper.clip, w)
            break
        clipper.clip()


def gradient(p: Tensor, rank: int, apart: float) -> Tensor:
    generator = torch.Generator().manual_seed(p.numel())
    g = torch.randn(p.shape, generator=generator)
    return g * (1 + apart * rank * torch.linspace(-1, 1, g.numel()).view_as(g))


@pytest.mark.parametrize(
    ("apart", "lines", "raises"), [(0.0, 0, False), (1e-6, 1, False), (5e-4, 1, False), (0.5, 0, True)]
)
@on_ranks(2)
def test_35_rounding_is_a_line_in_the_log(rank: int, apart: float, lines: int, raises: bool) -> None:
    model = mlp()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distclip")
    logger.addHandler(handler)
    try:
        clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND))
        for p in model.parameters():
            p.grad = gradient(p, rank, apart)
        if raises:
            with pytest.raises(distclip.OwnershipError, match="gradient"):
                clipper.clip()
            return
        clipper.clip()
    finally:
        logger.removeHandler(handler)
    told = [text for text in said if "not equal to the last bit" in text]
    assert len(told) == (lines if rank == 0 else 0), said
