"""28: a module that averages over some ranks is clipped by these ranks, and nobody waits for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests.faults.ways import BOUND, assert_right, clipping
from tests.harness import on_ranks
from tests.layouts import mesh2

SOURCES: dict[str, Callable[[Any], Any]] = {
    "module": lambda m: m,
    "parameters": lambda m: list(m.parameters()),
    "named": lambda m: list(m.named_parameters()),
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "a list of it": lambda m: [m],
    "nested": lambda m: nn.ModuleDict({"a": nn.ModuleDict({"b": m})}),
    "compiled": lambda m: torch.compile(m, backend="eager"),
}
LISTS = ("parameters", "named", "optimizer")


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def backward(m: nn.Module, seed: int) -> None:
    m.zero_grad()
    m(torch.full((2, 4), 1.0 + dist.get_rank() + seed)).square().sum().backward()


def clip(source: Any) -> list[Callable[[], Tensor]]:
    clipper = distclip.Clipper(source, distclip.GlobalNorm(BOUND))
    return [lambda: clipper.clip().total_norm, lambda: distclip.clip_grad_norm_(source, BOUND)]


@pytest.mark.parametrize("source", SOURCES)
@on_ranks(3)
def test_28_two_of_three(rank: int, source: str) -> None:
    """The third never clips."""
    group = dist.new_group([0, 1])
    if rank == 2:
        return
    m = DDP(mlp(), process_group=group)
    for way in clip(SOURCES[source](m)):
        for step in range(5):
            backward(m, step)
            assert_right(way, m)


@pytest.mark.parametrize("source", SOURCES)
@on_ranks(4)
def test_28_two_models_in_one_job(rank: int, source: str) -> None:
    """Each pair clips its own as often as it likes."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = rank // 2
    m = DDP(mlp(seed=mine), process_group=groups[mine])
    for way in clip(SOURCES[source](m)):
        for step in range(3 + 3 * mine):
            backward(m, step)
            assert_right(way, m)


@pytest.mark.parametrize("way", ["clip", "clip, overlap", "step", "function", "list"])
@on_ranks(3)
def test_28_ways(rank: int, way: str) -> None:
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    m = DDP(mlp(), process_group=group)
    with clipping(way, m) as clip:
        for step in range(4):
            backward(m, step)
            assert_right(clip, m)


@on_ranks(3)
def test_28_unsynchronised_is_still_noticed(rank: int) -> None:
    group = dist.new_group([0, 1])
    if rank == 2:
        return
    m = DDP(mlp(), process_group=group)
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    backward(m, 0)
    clipper.clip()
    with m.no_sync():
        backward(m, 1)
    with pytest.raises(distclip.OwnershipError, match="synchronised"):
        clipper.clip()


def gathered(m: nn.Module, group: Any) -> Callable[[], list[Tensor]]:
    """One of each kind of piece of the group."""

    def dense() -> list[Tensor]:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, [p.grad.double().clone() for p in m.parameters()], group=group)
        return [g for part in parts for g in part]

    return dense


@pytest.mark.parametrize("source", SOURCES)
@on_ranks(4)
def test_28_within_a_pipeline_stage(rank: int, source: str) -> None:
    mesh = mesh2(2, 2, "pp", "dp")
    m = DDP(mlp(seed=mesh["pp"].get_local_rank()), process_group=mesh.get_group("dp"))
    for stages in (mesh["pp"], mesh.get_group("pp")):
        given = SOURCES[source](m)
        clipper = distclip.Clipper(given, distclip.GlobalNorm(BOUND), stages=stages)
        for step in range(3):
            backward(m, step)
            assert_right(lambda c=clipper: c.clip().total_norm, m, gathered(m, mesh.get_group("pp")))  # type: ignore[misc]


@on_ranks(4)
def test_28_experts_beside(rank: int) -> None:
    """A dense part that all average, and experts that pairs do: the declaration says which is which."""
    mesh = mesh2(2, 2, "edp", "ep")
    dense = DDP(mlp())
    expert = DDP(mlp(seed=1 + mesh["ep"].get_local_rank()), process_group=mesh.get_group("edp"))
    distclip.declare(expert, sharded_over=mesh["ep"])
    model = nn.ModuleDict({"dense": dense, "expert": expert})
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND))

    def whole() -> list[Tensor]:
        once = [p.grad.double().clone() for p in dense.parameters()]
        return once + gathered(expert, mesh.get_group("ep"))()

    for step in range(3):
        backward(dense, step)
        backward(expert, step)
        assert_right(lambda: clipper.clip().total_norm, model, whole)


@on_ranks(4)
def test_28_two_groups_that_nothing_joins(rank: int) -> str:
    """Averaged over pairs that overlap with nothing said: an error on all, or right."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.ModuleDict(
        {"all": DDP(mlp()), "pair": DDP(mlp(seed=rank // 2), process_group=pairs[rank // 2])}
    )
    for m in model.values():
        backward(m, 0)
    with pytest.raises(distclip.OwnershipError, match=r"pair\.0\.weight") as caught:
        distclip.Clipper(model, distclip.GlobalNorm(BOUND)).clip()
    return str(caught.value).replace(f"rank {rank}", "rank")


def fsdp1(group: Any, **kwargs: Any) -> nn.Module:
    return FSDP1(mlp(), process_group=group, device_id=torch.device("cpu"), **kwargs)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "FSDP1": fsdp1,
    "FSDP1, original parameters": lambda group: fsdp1(group, use_orig_params=True),
    "FSDP1, NO_SHARD": lambda group: fsdp1(group, sharding_strategy=ShardingStrategy.NO_SHARD),
}


@pytest.mark.parametrize("kind", [*WRAPPED, "FSDP2"])
@on_ranks(4)
def test_28_sharded_over_a_pair(rank: int, kind: str) -> None:
    """Pairs with models of their own, who clip as often as they like."""
    mesh = mesh2(2, 2, "models", "dp")
    group = mesh.get_group("dp")
    m: Any = fully_shard(mlp(), mesh=mesh["dp"]) if kind == "FSDP2" else WRAPPED[kind](group)
    sources = [m, [m], nn.ModuleDict({"a": m})] + ([list(m.parameters())] if kind == "FSDP2" else [])

    def dense() -> list[Tensor]:
        if kind == "FSDP2":
            return [p.grad.full_tensor().double() for p in m.parameters()]
        own = [p.grad.double().clone() for p in m.parameters() if p.grad is not None]
        if "NO_SHARD" in kind:
            return own
        parts: list[Any] = [None, None]
        dist.all_gather_object(parts, own, group=group)
        return [g for part in parts for g in part]

    for source in sources:
        clipper = distclip.Clipper(source, distclip.GlobalNorm(BOUND))
        for step in range(2 + rank // 2):
            backward(m, step)
            assert_right(lambda c=clipper: c.clip().total_norm, m, dense)  # type: ignore[misc]


@on_ranks(4)
def test_28_hybrid_fsdp1_with_groups_of_its_own(rank: int) -> None:
    mesh = mesh2(2, 2, "replicate", "shard")
    groups = (mesh.get_group("shard"), mesh.get_group("replicate"))
    m = FSDP1(
        mlp(),
        process_group=groups,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=torch.device("cpu"),
    )
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    for step in range(3):
        backward(m, step)
        assert_right(lambda: clipper.clip().total_norm, m, gathered(m, groups[0]))
