"""What tests/faults/test_random_changes.py has found, one row each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.integrations.accelerate import install
from tests import oracle
from tests.faults.test_22_replaced import mlp, planted, sharded, tensor_parallel
from tests.faults.ways import CLIPPERS, Way, assert_right, fill, raised
from tests.harness import on_ranks
from tests.integrations.accelerators import accelerator
from tests.layouts import mesh2


def assigned(m: Any) -> None:
    m.module.load_state_dict({k: v.detach().clone() for k, v in m.module.state_dict().items()}, assign=True)


def head(m: Any) -> None:
    torch.manual_seed(5)
    m.module[2] = nn.Linear(8, 4)


@pytest.mark.parametrize("way", ["clip", "step", "function", "list"])
@pytest.mark.parametrize("change", [assigned, head])
@on_ranks(4)
def test_what_is_put_into_ddp_lives_on_its_ranks(rank: int, change: Callable[[Any], None], way: str) -> None:
    """Others train another model, and never clip this one."""
    group = mesh2(2, 2, "replicate", "shard").get_group("shard")
    if rank < 2:
        model = DistributedDataParallel(mlp(), process_group=group)
        clip = Way(way, model)
        fill(model, 9.0)
        assert_right(clip, model)
        change(model)
        for step in range(3):
            fill(model, 9.0, seed=step)
            assert_right(clip, model)


@pytest.mark.parametrize("way", CLIPPERS)
@pytest.mark.parametrize("build", [sharded, tensor_parallel])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@on_ranks(2)
def test_module_to_while_gradients_are_there(rank: int, dtype: torch.dtype, build: Any, way: str) -> None:
    """``module.to()`` swaps DTensors, which refuses those that somebody refers to weakly."""
    model = build()
    clip = Way(way, model)
    for step in range(2):
        model(torch.ones(2, 4)).sum().backward()
        clip()
        if step == 0:
            model.zero_grad()
    model.to(dtype)
    for step in range(2):
        planted(model, step)
        assert_right(clip, model)


@pytest.mark.parametrize("way", ["clip", "step", "function"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@on_ranks(2)
def test_another_dtype_in_every_stage(rank: int, dtype: torch.dtype, way: str) -> None:
    """In one stage ``module.to()`` changes the parameters in place, in the other it puts others there."""
    torch.manual_seed(rank)
    model = mlp()
    alone = dist.new_group([1])
    if rank == 1:
        # With a name of its own: DTensor takes a mesh that is equal for the same, though its group be gone.
        name = f"{way}, {dtype}"
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(alone, "cpu", mesh_dim_names=(name,))
        fully_shard(model, mesh=mesh)
    clip = Way(way, model, stages=dist.group.WORLD)

    def dense() -> list[Any]:
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, [oracle.dense(p.grad) for p in model.parameters()])
        return [g for part in everyone for g in part]

    for step in range(2):
        planted(model, step)
        want = oracle.norm(dense())
        assert clip().item() == pytest.approx(want, rel=1e-5)
    model.zero_grad()
    model.to(dtype)
    for step in range(2):
        planted(model, step)
        want = oracle.norm(dense())
        assert clip().item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("way", [*CLIPPERS, "function", "list"])
def test_float64_after_the_first_clip(way: str) -> None:
    """Norms whose squares leave float64 are measured as in a model that was float64 at once."""
    model = mlp()
    clip = Way(way, model)
    fill(model)
    clip()
    model.double()
    fill(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e200)
    clip()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("way", ["clip", "step", "function", "list"])
@pytest.mark.parametrize("evaluates", ["nobody", "one", "all"])
@pytest.mark.parametrize("synchronised", [True, False])
@on_ranks(2)
def test_an_evaluation_is_no_step_without_synchronisation(
    rank: int, synchronised: bool, evaluates: str, way: str
) -> str:
    """Between backward and the clip, on one rank only say: nobody waits; and no_sync() is found all the same,
    at a step that does not compare gradients by itself."""
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp())
    clip = Way(way, model)
    x = torch.full((3, 4), 9.0 + rank)
    for step in range(3):
        model.zero_grad()
        if step < 2 or synchronised:
            model(x).pow(2).sum().backward()
        else:
            with model.no_sync():
                model(x).pow(2).sum().backward()
        if evaluates == "all" or (evaluates == "one" and rank == 1):
            with torch.no_grad():
                model(x)
        if step < 2 or synchronised:
            assert_right(clip, model)
    if synchronised:
        return ""
    error = raised(clip)
    assert error == "OwnershipError"
    return error


@pytest.mark.parametrize("kind", ["longer", "another head"])
@on_ranks(2)
def test_lists_of_drop_ins_that_change_on_one_rank(rank: int, kind: str) -> str:
    """They are known by their tensors: the list that shares some with the one before comes from it."""
    model = sharded()
    clip = Way("list", model)
    for step in range(3):
        planted(model, step)
        clip()
    if rank == 1:
        if kind == "longer":
            model.append(nn.Linear(4, 4))
        else:
            model[2] = nn.Linear(8, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    error = raised(clip)
    assert error == "OwnershipError"
    return error


@pytest.mark.parametrize("way", ["function", "accelerate"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
@on_ranks(2)
def test_a_list_that_is_known_on_one_rank_only(rank: int, rounds: int, way: str) -> str:
    """Of which as many steps were taken as of no other: the calls in which copies are compared differ, and
    the message of the step comes first, which is as long for each."""
    model = sharded()
    norm = nn.Linear(4, 4)
    for p in [*model.parameters(), *norm.parameters()]:
        p.grad = torch.ones_like(p)
    whole, part = [*model.parameters(), *norm.parameters()], [*norm.parameters(), *model.parameters()]
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    with contextlib.ExitStack() as stack:
        measure = distclip.total_grad_norm
        if way == "accelerate":
            a = stack.enter_context(accelerator("fsdp2"))
            a._models += [model, norm]
            stack.enter_context(install(a))
            measure = partial(a.clip_grad_norm_, max_norm=math.inf)
        measure(whole)
        for _ in range(rounds):
            measure(part)
        with pytest.raises(distclip.OwnershipError, match="Change them on every rank") as error:
            measure(whole if rank else [*whole, extra])
    return type(error.value).__name__
