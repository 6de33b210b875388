"""Law 14: a rank that waits for others at a plan says for which, and why; an error ends it, never a hang."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d

import distclip
from distclip.planning import arrival
from distclip.planning.arrival import _sentence
from tests.faults.ways import BOUND
from tests.harness import on_ranks

SHORT = timedelta(seconds=4)


def net() -> nn.Linear:
    torch.manual_seed(0)
    m = nn.Linear(4, 4)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    return m


@contextmanager
def heard(patience: float = 0.2) -> Iterator[list[str]]:
    """Lines of the log, from ranks that soon lose patience."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, before = logging.getLogger("distclip"), arrival.PATIENCE
    logger.addHandler(handler)
    arrival.PATIENCE = patience
    try:
        yield lines
    finally:
        arrival.PATIENCE = before
        logger.removeHandler(handler)


def waits(lines: list[str]) -> list[str]:
    return [line for line in lines if "has waited" in line]


# Everything that makes a plan.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "clip": lambda m, g: distclip.Clipper(m, distclip.GlobalNorm(BOUND), process_group=g).clip(),
    "describe": lambda m, g: distclip.Clipper(m, distclip.GlobalNorm(BOUND), process_group=g).describe(),
    "function": lambda m, g: distclip.clip_grad_norm_(m, BOUND, process_group=g),
    "total": lambda m, g: distclip.total_grad_norm(list(m.parameters()), process_group=g),
}


def meet_late(rank: int, late: int, call: Callable[[], Any]) -> list[str]:
    """One comes when all others have said that they wait."""
    store: Any = c10d._get_default_store()
    with heard() as lines:
        if rank == late:
            store.wait([f"said/{r}" for r in range(dist.get_world_size()) if r != late])
        else:
            logging.getLogger("distclip").addHandler(_Telling(store, f"said/{rank}"))
        try:
            call()
        finally:
            logger = logging.getLogger("distclip")
            for handler in [h for h in logger.handlers if isinstance(h, _Telling)]:
                logger.removeHandler(handler)
    dist.barrier()
    if rank == 0:
        for r in range(dist.get_world_size()):
            store.delete_key(f"said/{r}")
    dist.barrier()
    return waits(lines)


class _Telling(logging.Handler):
    def __init__(self, store: Any, key: str) -> None:
        super().__init__()
        self.store, self.key = store, key

    def emit(self, record: logging.LogRecord) -> None:
        self.store.set(self.key, "")


@pytest.mark.parametrize("call", CALLS)
@on_ranks(3)
def test_one_rank_is_late(rank: int, call: str) -> None:
    for late in (0, 2):
        lines = meet_late(rank, late, lambda: CALLS[call](net(), None))
        assert len(lines) == (rank != late)
        for line in lines:
            assert f"rank {rank} has waited" in line
            assert f"together with rank(s) {late}, which have not come" in line
            assert "2 parameter(s) (" in line
            assert "weight'" in line or "parameters[0]" in line
            assert "on some ranks only" in line
            assert "process_group=" in line


@on_ranks(2)
def test_nothing_is_said_in_time(rank: int) -> None:
    with heard(patience=20.0) as lines:
        for call in CALLS.values():
            call(net(), None)
    assert not waits(lines)


@pytest.mark.parametrize("call", CALLS)
@on_ranks(2)
def test_never_comes(rank: int, call: str) -> None:
    """An error after the timeout of the group, which stays usable; the next plan finds everybody."""
    group: Any = dist.new_group([0, 1], timeout=SHORT)
    if rank == 0:
        with heard() as lines, pytest.raises(distclip.OwnershipError, match=r"rank\(s\) 1, .* Gave up\."):
            CALLS[call](net(), group)
        assert len(waits(lines)) == 1
    dist.barrier()
    flag = torch.ones(())
    dist.all_reduce(flag, group=group)
    assert flag == 2
    for _ in range(2):
        CALLS[call](net(), group)


@on_ranks(3)
def test_never_comes_to_a_group_of_some(rank: int) -> None:
    group: Any = dist.new_group([0, 2], timeout=SHORT)
    if rank == 0:
        with pytest.raises(distclip.OwnershipError, match=r"rank 0 has waited .* rank\(s\) 2, which"):
            CALLS["clip"](net(), group)
    dist.barrier()
    if rank != 1:
        CALLS["clip"](net(), group)


@pytest.mark.parametrize("call", ["clip", "function"])
@on_ranks(3)
def test_at_cross_purposes(rank: int, call: str) -> None:
    """Ranks that wait for each other in different groups find out at once, and whoever waits with them is
    told. The next plan is made as if nothing had been."""
    group: Any = dist.new_group([0, 2])
    began = time.monotonic()
    if rank == 0:
        with pytest.raises(distclip.OwnershipError, match=r"at the same time with others, [02] among them"):
            CALLS[call](net(), group)
    else:
        with pytest.raises(distclip.OwnershipError, match=r"at the same time with others, [02] among them"):
            CALLS[call](net(), None)
    assert time.monotonic() - began < 15  # the timeout is 30
    dist.barrier()
    CALLS[call](net(), None)
    if rank != 1:
        CALLS[call](net(), group)


@on_ranks(3)
def test_groups_one_after_the_other_are_no_cross_purposes(rank: int) -> None:
    """However late one comes."""
    pairs: list[Any] = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
    for pair, members in zip(pairs, [(0, 1), (1, 2), (0, 2)], strict=True):
        if rank in members:
            time.sleep(1.3 * (rank == 1))
            CALLS["clip"](net(), pair)
    CALLS["clip"](net(), None)


@on_ranks(2)
def test_a_bad_argument_on_one_rank(rank: int) -> None:
    """That rank raises before it knows of the others; these are told that it has not come."""
    group: Any = dist.new_group([0, 1], timeout=SHORT)
    if rank:
        with pytest.raises(ValueError, match="on_nonfinite"):
            distclip.Clipper(net(), distclip.GlobalNorm(1.0), process_group=group, on_nonfinite="no")  # type: ignore[arg-type]
    else:
        with pytest.raises(distclip.OwnershipError, match=r"rank\(s\) 1, which have not come"):
            CALLS["clip"](net(), group)
    dist.barrier()


class _Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


@on_ranks(2)
def test_a_plan_that_stands_asks_nothing(rank: int) -> None:
    real, store = c10d._get_default_store, _Counting(c10d._get_default_store())
    c10d._get_default_store = lambda: store  # type: ignore[assignment,return-value]
    try:
        m = net()
        clipper = distclip.Clipper(m, distclip.GlobalNorm(1.0))
        clipper.clip()
        distclip.clip_grad_norm_(m, 1.0)
        assert store.calls > 0
        asked = store.calls
        for _ in range(9):
            clipper.clip()
            distclip.clip_grad_norm_(m, 1.0)
        assert store.calls == asked
    finally:
        c10d._get_default_store = real


@on_ranks(2)
def test_meetings_leave_nothing_behind(rank: int) -> None:
    """However many plans are made, the store does not grow."""
    store: Any = c10d._get_default_store()
    sizes = []
    for _ in range(4):
        CALLS["clip"](net(), None)
        dist.barrier()
        sizes.append(store.num_keys())
        dist.barrier()
    assert sizes[1] == sizes[-1]


@on_ranks(2)
def test_silent_where_there_is_no_store(rank: int) -> None:
    real = c10d._get_default_store

    def none() -> Any:
        raise RuntimeError("no store")  # as torch's own, of a group made otherwise

    c10d._get_default_store = none
    try:
        assert CALLS["clip"](net(), None).total_norm.item() == pytest.approx(20**0.5)
    finally:
        c10d._get_default_store = real


class _Store:
    """Of a job of very many ranks, of which some have come."""

    def __init__(self, come: int) -> None:
        self.come, self.keys, self.checks = come, {}, 0  # type: ignore[var-annotated]

    def check(self, keys: list[str]) -> bool:
        self.checks += 1
        name = keys[0].rsplit("/", 1)[1]
        return keys[0] in self.keys or (name.isdigit() and int(name) < self.come)

    def add(self, key: str, amount: int) -> int:
        self.keys[key] = self.keys.get(key, 0) + amount
        return int(self.keys[key])

    def set(self, key: str, value: str) -> None:
        self.keys[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.keys[key]  # type: ignore[no-any-return]


def test_sixteen_thousand_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short text, and one rank alone that looks for all of them."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(16_384)))
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 7)
    store: Any = _Store(come=20)
    group: Any = None
    missing = arrival._missing(store, "room", group)
    assert missing == list(range(20, 16_384))
    looked = store.checks
    for _ in range(50):
        assert arrival._missing(store, "room", group) == missing
    assert store.checks - looked == 50
    text = _sentence(30.0, missing, ["a", "b", "c"])
    assert "rank(s) 20, 21, 22, 23, 24, 25, 26, 27, … (16364 ranks)" in text
    assert len(text) < 600


def test_a_few_that_are_missed_are_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(1000)))
    store: Any = _Store(come=990)
    group: Any = None
    assert arrival._missing(store, "room", group) == list(range(990, 1000))
    store.come = 995
    assert arrival._missing(store, "room", group) == list(range(995, 1000))
