"""The plan's arithmetic for worlds that no test machine has, on torch's fake process group: one process
plays one rank, and collectives leave its numbers as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import distclip
from distclip.layout.parameters import named_parameters
from distclip.planning.plan import Plan, build_plan
from tests.counting import count_calls

WORLDS = {8: (4, 2), 64: (8, 8), 16_384: (2048, 8)}  # (dp, tp)


@contextmanager
def world_of(shape: tuple[int, int], rank: int = 0) -> Iterator[DeviceMesh]:
    size = math.prod(shape)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(params=WORLDS, ids=lambda n: f"{n}ranks")
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    with world_of(WORLDS[request.param]) as mesh:
        yield mesh


def piece(mesh: DeviceMesh, *placements: Any, local: tuple[int, ...] = (2, 3)) -> Tensor:
    """A parameter with a gradient, from its local piece: each axis that shards it makes it so much larger."""
    # No nn.Parameter, which would detach(): DTensor remembers the result of operators by mesh, and would
    # hand out the equal mesh of an earlier world, whose groups are gone.
    whole, gradient = (DTensor.from_local(torch.ones(local), mesh, placements, run_check=False) for _ in "wg")
    whole.requires_grad_(True).grad = gradient
    return whole


def plan_of(*parameters: Tensor) -> Plan:
    return build_plan(named_parameters(parameters))


def group_size(plan: Plan) -> int:
    return 1 if plan.group is None else plan.group.size()


class Messages:
    """What a step sends: (numbers, ranks) of each all-reduce."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[int, int]] = []
        all_reduce = dist.all_reduce

        def recording(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            self.sent.append((tensor.numel(), dist.get_world_size(group)))
            return all_reduce(tensor, *args, group=group, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", recording)


def everything(mesh: DeviceMesh) -> dict[str, tuple[Tensor, int]]:
    """Parameters, and on how many of all ranks each element lives."""
    dp, tp = mesh["dp"], mesh["tp"]
    return {
        "both": (piece(mesh, Shard(0), Shard(1)), 1),
        "twice": (piece(mesh, Shard(0), Shard(0)), 1),
        "fsdp over tp": (piece(mesh, _StridedShard(0, split_factor=tp.size()), Shard(0)), 1),
        "dp": (piece(mesh, Shard(0), Replicate()), tp.size()),
        "tp": (piece(mesh, Replicate(), Shard(1)), dp.size()),
        "none": (piece(mesh, Replicate(), Replicate()), mesh.size()),
        "slice dp": (piece(dp, Shard(0)), tp.size()),
        "slice tp": (piece(tp, Shard(1)), dp.size()),
        "slice none": (piece(tp, Replicate()), mesh.size()),
        "plain": (nn.Parameter(torch.ones(2, 3)), mesh.size()),
    }


def test_multiplicities(mesh: DeviceMesh) -> None:
    cases = everything(mesh)
    plan = plan_of(*(tensor for tensor, _ in cases.values()))
    assert group_size(plan) == mesh.size()
    assert dict(zip(cases, plan.multiplicities, strict=True)) == {name: m for name, (_, m) in cases.items()}


def test_every_element_counts_once(mesh: DeviceMesh) -> None:
    """All ranks' pieces, each divided by its multiplicity, make up the whole."""
    tensors = [tensor for tensor, _ in everything(mesh).values()]
    plan = plan_of(*tensors)
    for tensor, multiplicity in zip(tensors, plan.multiplicities, strict=True):
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        assert local.numel() * group_size(plan) == tensor.numel() * multiplicity


def test_smallest_group(mesh: DeviceMesh) -> None:
    """FSDP2 and HSDP reduce over their one shard axis; replicas over nobody."""
    dp, tp = mesh["dp"], mesh["tp"]
    along_dp = piece(mesh, Shard(0), Replicate()), piece(mesh, Shard(1), Replicate())
    assert group_size(plan_of(*along_dp)) == dp.size()
    assert group_size(plan_of(piece(mesh, Replicate(), Shard(0)))) == tp.size()
    assert (
        group_size(plan_of(piece(mesh, Replicate(), Replicate()), piece(mesh, Replicate(), Replicate()))) == 1
    )
    assert (
        group_size(plan_of(piece(mesh, Shard(0), Replicate()), piece(mesh, Replicate(), Shard(0))))
        == mesh.size()
    )
    # A replicated bias beside the shards lives on every rank of their group.
    plan = plan_of(along_dp[0], piece(mesh, Replicate(), Replicate()), nn.Parameter(torch.ones(3)))
    assert (group_size(plan), plan.multiplicities) == (dp.size(), (1, dp.size(), dp.size()))
    # One shard axis beside slices of the same root mesh.
    assert group_size(plan_of(piece(dp, Shard(0)), piece(tp, Replicate()))) == dp.size()


def test_plain_parameters_alone(mesh: DeviceMesh) -> None:
    """DDP: every rank holds everything, so nothing is sent."""
    plan = plan_of(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)))
    assert (group_size(plan), plan.multiplicities) == (1, (1, 1))
    assert plan.scope.size == mesh.size()


def test_one_message_of_one_number_per_norm(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(name, tensor) for name, (tensor, _) in everything(mesh).items()]
    for strategy, numbers in (
        (distclip.GlobalNorm(1.0), 1),
        (distclip.GlobalNorm(1.0, math.inf), 1),
        (distclip.Value(1.0), 1),
        (distclip.PerParameter(1.0), len(named)),
        (distclip.PerGroup({"slice*": 1.0, "*": 2.0}), 3),  # and those that no pattern fits
    ):
        clipper = distclip.Clipper(named, strategy)
        assert clipper.plan.group is not None
        with monkeypatch.context() as patch:
            messages = Messages(patch)
            clipper.clip()
            # (The plain one has no gradient, so that it is compared at the first step.) Beside the norms five
            # numbers: whether any rank's plan is out of date, or is asked for something else.
            assert messages.sent[-1] == (numbers + 5, mesh.size()), strategy
            clipper.clip()  # the second time copies are compared again
            clipper.clip(param_norms=True)  # the first time, ranks agree that all do
            messages.sent.clear()
            clipper.clip(param_norms=True)  # the fourth call, in which copies are compared
            assert messages.sent[-1] == (len(named) + 5, mesh.size()), strategy
            messages.sent.clear()
            clipper.clip(param_norms=True)
            assert messages.sent == [(len(named) + 5, mesh.size())], strategy


def test_planning_talks_in_a_few_words_per_parameter(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All-reduces whose size does not grow with the number of ranks; no gather."""
    tensors = [tensor for tensor, _ in everything(mesh).values()]
    messages = Messages(monkeypatch)
    plan_of(*tensors)
    assert 0 < sum(numbers for numbers, _ in messages.sent) <= 64 * len(tensors)
    messages.sent.clear()
    plan_of(piece(mesh, Shard(0), Shard(1)), piece(mesh, Shard(0), Shard(0)))  # proven by their mesh
    assert [n for n, _ in messages.sent] == [24]  # of a fixed size: settings and lists, whatever their length


@pytest.mark.parametrize("size", WORLDS)
def test_every_rank_plans_the_same(size: int) -> None:
    plans = []
    for rank in (0, 1, size // 2, size - 1):
        with world_of(WORLDS[size], rank) as mesh:
            cases = everything(mesh)
            plan = plan_of(*(tensor for tensor, _ in cases.values()))
            one_axis = plan_of(cases["dp"][0])
            plans.append(
                (plan.names, plan.multiplicities, plan.scope.ranks, group_size(plan), group_size(one_axis))
            )
    assert all(plan == plans[0] for plan in plans)


def test_planning_ten_thousand_parameters_on_sixteen_thousand_ranks() -> None:
    with world_of(WORLDS[16_384]) as mesh:
        placements = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(0))]
        named = named_parameters([piece(mesh, *placements[i % 3]) for i in range(10_000)])
        with count_calls() as calls:
            plan = build_plan(named)
    assert calls.count < 100 * len(named)  # 77
    assert plan.multiplicities[:3] == (1, 8, 2048)


def test_experts_on_a_mesh_of_their_own() -> None:
    """Experts over (edp, ep) beside dense layers over dp: two meshes without a common root."""
    with world_of(WORLDS[64]):
        dense = init_device_mesh("cpu", (64,), mesh_dim_names=("dp",))
        experts = init_device_mesh("cpu", (16, 4), mesh_dim_names=("edp", "ep"))
        plan = plan_of(
            piece(dense, Shard(0)),
            piece(experts, Shard(1), Shard(0)),
            piece(experts, Replicate(), Shard(0)),
            piece(dense, Replicate()),
        )
        assert (group_size(plan), plan.multiplicities) == (64, (1, 1, 16, 64))


def test_axes_of_length_one() -> None:
    with world_of((8, 1)) as mesh:
        plan = plan_of(piece(mesh, Shard(0), Shard(1)), piece(mesh, Replicate(), Shard(0)))
        assert (group_size(plan), plan.multiplicities) == (8, (1, 8))


def test_half_of_the_world() -> None:
    """A model on 32 of 64 ranks: its scope is those, whoever else runs."""
    for rank in (0, 40):
        with world_of(WORLDS[64], rank):
            halves = [DeviceMesh("cpu", list(range(a, a + 32)), mesh_dim_names=("dp",)) for a in (0, 32)]
            mine = halves[rank // 32]
            plan = plan_of(piece(mine, Shard(0)), piece(mine, Replicate()), nn.Parameter(torch.ones(2)))
            assert plan.scope.ranks == tuple(mine.mesh.tolist())
            assert (group_size(plan), plan.multiplicities) == (32, (1, 32, 32))


def test_unrelated_meshes_are_refused() -> None:
    with world_of(WORLDS[8]):
        halves = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in ([0, 1, 2, 3], [0, 4, 5, 6])]
        with pytest.raises(ValueError, match="process_group="):
            plan_of(*(piece(half, Shard(0)) for half in halves))
