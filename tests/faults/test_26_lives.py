"""26: a plan belongs to one life of its process groups; what these are called says nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip
from tests.faults.ways import BOUND
from tests.harness import on_ranks

# --- the default group, destroyed and made anew: in processes of their own --------------------------------


def dense_and_expert(rank: int, which: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    m = nn.ModuleDict({"dense": nn.Linear(4, 4)})
    torch.manual_seed(100 + which)
    m["expert"] = nn.Linear(4, 4)
    return m


def right(m: nn.ModuleDict, which: int, norm: Callable[[], Any]) -> None:
    """Experts 0 and 1 have gradients of 1 and 4, the rest 1: whoever holds which."""
    for name, p in m.named_parameters():
        p.grad = torch.full_like(p, 1.0 + 3 * which * ("expert" in name))
    assert float(norm()) == pytest.approx((20 + 20 + 20 * 16) ** 0.5, rel=1e-5)


def clip(clipper: distclip.Clipper) -> Any:
    return clipper.clip().total_norm


PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3)]


def groups(order: list[tuple[int, int]], mine: tuple[tuple[int, int], tuple[int, int]], rank: int) -> Any:
    made = {pair: dist.new_group(list(pair)) for pair in order}
    return next(made[pair] for pair in mine if rank in pair)


def two_lives(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    strategy = distclip.GlobalNorm(1e9)
    clipper = m = None
    for life in range(3):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{life}",
            rank=rank,
            world_size=4,
            timeout=timedelta(seconds=60),
        )
        # The same names for other ranks: pairs along one axis, then along the other.
        mine = (((0, 1), (2, 3)), ((0, 2), (1, 3)))[life % 2]
        order = PAIRS if life % 2 == 0 else PAIRS[::-1]
        group = groups(order, mine, rank)  # type: ignore[arg-type]
        which = dist.get_rank(group)
        if m is None:
            m = dense_and_expert(rank, which)
        for i, p in enumerate(m["expert"].parameters()):
            torch.manual_seed(which + i)
            p.data.normal_()
        if life == 1 and clipper is not None:
            p = m["expert"].weight
            p.grad = torch.ones_like(p)  # type: ignore[assignment]
            for call in (clipper.clip, partial(distclip.clip_grad_norm_, m, 1e9)):
                with pytest.raises(distclip.OwnershipError, match=r"destroyed.*declare"):
                    call()
        distclip.declare(m["expert"], sharded_over=group)
        if clipper is None:
            clipper = distclip.Clipper(m, strategy)
        for _ in range(2):
            right(m, which, partial(clip, clipper))
            right(m, which, partial(distclip.clip_grad_norm_, m, 1e9))
        mesh = init_device_mesh(
            "cpu", (2, 2) if life % 2 else (4,), mesh_dim_names=("a", "b")[: 1 + life % 2]
        )
        sharded: Any = fully_shard(nn.Linear(4, 4), mesh=mesh)
        fresh = distclip.Clipper(sharded, distclip.GlobalNorm(1e9))
        for p in sharded.parameters():
            p.grad = torch.ones_like(p)
        assert fresh.clip().total_norm.item() == pytest.approx(20**0.5)
        dist.barrier()
        del sharded, fresh
        import gc

        gc.collect()
        dist.destroy_process_group()
    assert clipper is not None
    for p in m.parameters():  # type: ignore[union-attr]
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="destroyed"):  # alone, and still declared over a group
        clipper.clip()
    open(f"{folder}/done{rank}", "w").close()
    os._exit(0)


def test_26_three_lives() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(two_lives, args=(folder,), nprocs=4, start_method="forkserver")  # type: ignore[no-untyped-call]
        assert all(os.path.exists(f"{folder}/done{rank}") for rank in range(4))


# --- groups of some ranks, destroyed and made anew in one life -------------------------------------------


def declared(rank: int, group: Any) -> nn.Linear:
    torch.manual_seed(rank)
    m = nn.Linear(4, 4)
    distclip.declare(m, sharded_over=group)
    for p in m.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    return m


@pytest.mark.parametrize("first", [True, False])
@on_ranks(2)
def test_26_a_declared_group_that_is_gone(rank: int, first: bool) -> str:
    group: Any = dist.new_group([0, 1])
    m = declared(rank, group)
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    if not first:
        clipper.clip()
    dist.destroy_process_group(group)
    if not first:
        m.register_parameter("late", nn.Parameter(torch.ones(2)))  # so that it is planned anew
    with pytest.raises(distclip.OwnershipError, match=r"destroyed since.*declare") as caught:
        clipper.clip()
    distclip.declare(m, sharded_over=dist.group.WORLD)
    if not first:
        distclip.declare(m.late, sharded_over=())  # type: ignore[arg-type]
        m.late.grad = torch.zeros(2)  # type: ignore[union-attr]
    for p in (m.weight, m.bias):
        p.grad = torch.full_like(p, 1.0 + rank)
    assert clipper.clip().total_norm.item() == pytest.approx((20 * 5) ** 0.5, rel=1e-5)
    return str(caught.value)


@pytest.mark.parametrize("argument", ["stages", "process_group"])
@on_ranks(2)
def test_26_a_group_that_was_passed_is_gone(rank: int, argument: str) -> None:
    """Before the first clip, and after it."""
    for first in (True, False):
        group: Any = dist.new_group([0, 1])
        torch.manual_seed(0)
        m = nn.Linear(4, 4)
        kwargs: dict[str, Any] = {argument: group}
        clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND), **kwargs)
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        if not first:
            clipper.clip()
        dist.destroy_process_group(group)
        with pytest.raises((ValueError, distclip.OwnershipError), match="destroyed"):
            [clipper.clip() for _ in range(4)]  # replicas need it at powers of two only


@on_ranks(2)
def test_26_a_mesh_made_anew(rank: int) -> None:
    """Sharded over other groups of other names, by the same program."""
    norms = []
    for _ in range(3):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        torch.manual_seed(0)
        m: Any = fully_shard(nn.Linear(4, 4), mesh=mesh)
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        norms.append(distclip.clip_grad_norm_(m, 1e9).item())
        norms.append(distclip.clip_grad_norm_(list(m.parameters()), 1e9).item())
    assert norms == pytest.approx([20**0.5] * 6)


@on_ranks(2)
def test_26_names_used_again(rank: int) -> None:
    """Groups made and destroyed in turn: meetings of the one are not those of the other."""
    for _ in range(4):
        group: Any = dist.new_group([0, 1])
        m = declared(rank, group)
        clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND), process_group=group)
        assert clipper.clip().total_norm.item() == pytest.approx((20 * 5) ** 0.5, rel=1e-5)
        dist.barrier()
        dist.destroy_process_group(group)
