"""24: plain parameters are replicas only once their gradients have been compared, finite, on all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from tests.faults.ways import BOUND, Way, assert_right, clipping, raised
from tests.harness import on_ranks

WAYS = ["clip", "clip, overlap", "step", "function", "list", "accelerate"]
X = torch.ones(2, 4)


def experts() -> nn.ModuleDict:
    """Made from one seed on every rank, as scripts do, so that nothing but gradients tells them apart."""
    torch.manual_seed(0)
    return nn.ModuleDict({"dense": nn.Linear(4, 4), "expert": nn.Linear(4, 4)})


def backward(m: Any, rank: int, factor: float = 1.0) -> None:
    m.zero_grad()
    ((m["dense"](X).sum() + m["expert"](X * (1 + 10 * rank)).sum()) * factor).backward()


def nothing(m: Any, rank: int, clip: Way) -> None:
    """The first clip comes with gradients."""


def described(m: Any, rank: int, clip: Way) -> None:
    if clip.clipper is not None:
        str(clip.clipper.describe())


def before_backward(m: Any, rank: int, clip: Way) -> None:
    clip()


def overflowed(m: Any, rank: int, clip: Way) -> None:
    for value in (math.inf, math.nan):
        backward(m, rank)
        for p in m.parameters():
            p.grad.fill_(value)
        clip()


def overflowed_on_one(m: Any, rank: int, clip: Way) -> None:
    """Of the expert alone: all that the other rank has to show is nothing to compare with."""
    for _ in range(2):
        m.zero_grad()
        m["dense"](X).sum().backward()
        m["expert"].weight.grad = torch.full((4, 4), math.inf)
        clip()


def zeros_first(m: Any, rank: int, clip: Way) -> None:
    for _ in range(3):
        backward(m, rank, 0.0)
        clip()


def one_tower(m: Any, rank: int, clip: Way) -> None:
    for _ in range(3):
        m.zero_grad()
        m["dense"](X).sum().backward()
        clip()


def frozen_first(m: Any, rank: int, clip: Way) -> None:
    m["expert"].requires_grad_(False)
    one_tower(m, rank, clip)
    m["expert"].requires_grad_(True)


def equal_at_first(m: Any, rank: int, clip: Way) -> None:
    """Routers that have not begun to differ: proven, and all the same no replicas."""
    for _ in range(3):
        backward(m, 0)
        clip()


BEGINNINGS: dict[str, Callable[[Any, int, Way], None]] = {
    f.__name__: f
    for f in (
        nothing,
        described,
        before_backward,
        overflowed,
        overflowed_on_one,
        zeros_first,
        one_tower,
        frozen_first,
        equal_at_first,
    )
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
@on_ranks(2)
def test_24_experts_of_one_seed(rank: int, beginning: str, way: str) -> str:
    m = experts()
    with clipping(way, m) as clip:
        BEGINNINGS[beginning](m, rank, clip)
        for step in range(8):  # the powers of two are not far
            backward(m, rank)
            if error := raised(clip):
                assert error == "OwnershipError"
                return f"at step {step}"
        raise AssertionError("nobody noticed")


@pytest.mark.parametrize("way", ["clip", "step", "function"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
@on_ranks(2)
def test_24_replicas_go_on(rank: int, beginning: str, way: str) -> None:
    """The same beginnings, and gradients that are equal: no error, and the right norm."""
    m = experts()
    with clipping(way, m) as clip:
        BEGINNINGS[beginning](m, 0, clip)
        for _ in range(8):
            backward(m, 0, 9.0)
            assert_right(clip, m)


@pytest.mark.parametrize("way", ["clip", "function"])
@on_ranks(4)
def test_24_one_of_four(rank: int, way: str) -> str:
    m = experts()
    with clipping(way, m) as clip:
        before_backward(m, rank, clip)
        for step in range(8):
            backward(m, int(rank == 3))
            if error := raised(clip):
                assert error == "OwnershipError"
                return f"at step {step}"
        raise AssertionError("nobody noticed")


@pytest.mark.parametrize("way", ["clip", "function"])
@on_ranks(2)
def test_24_a_last_bit_is_no_error(rank: int, way: str) -> None:
    """Said once, and again where it has grown tenfold."""
    m, said = experts(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distclip").addHandler(handler)
    try:
        with clipping(way, m) as clip:
            for step in range(17):
                backward(m, 0)
                for p in m.parameters():
                    p.grad.mul_(1 + (1e-6 if step < 10 else 1e-4) * rank)
                clip()
    finally:
        logging.getLogger("distclip").removeHandler(handler)
    lines = [line for line in said if "not equal to the last bit" in line]
    assert len(lines) == (2 if rank == 0 else 0), lines


@on_ranks(2)
def test_24_declared_experts_are_right(rank: int) -> None:
    m = experts()
    distclip.declare(m["expert"], sharded_over=torch.distributed.group.WORLD)
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    str(clipper.describe())

    def dense() -> list[Tensor]:
        own = [p.grad.double() for p in m["expert"].parameters()]
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, own)
        return [*(p.grad.double() for p in m["dense"].parameters()), *parts[0], *parts[1]]

    for _ in range(5):
        backward(m, rank)
        assert_right(lambda: clipper.clip().total_norm, m, dense)
