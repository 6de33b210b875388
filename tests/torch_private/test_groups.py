"""What is read of process groups and meshes, on real ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distclip.torch_private import groups
from tests.harness import on_ranks


@on_ranks(2)
def test_living_is_living_and_resolve(rank: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    made = dist.new_group([0, 1])
    name = made.group_name
    assert {world, made} <= set(groups.living())
    assert groups.is_living(made)
    assert groups.resolve(name) is made
    dist.destroy_process_group(made)
    assert made not in groups.living()
    assert not groups.is_living(made)
    with pytest.raises(RuntimeError):
        groups.resolve(name)


@on_ranks(2)
def test_default_store(rank: int) -> None:
    store = groups.default_store()
    store.set(f"test_default_store/{rank}", str(rank))
    assert store.get(f"test_default_store/{1 - rank}") == str(1 - rank).encode()
    dist.barrier()
    store.delete_key(f"test_default_store/{rank}")


@on_ranks(2)
def test_device_kinds(rank: int) -> None:
    assert "cpu" in groups.device_kinds(dist.new_group([0, 1], backend="gloo"))


@on_ranks(2)
def test_timeout_of(rank: int) -> None:
    made = dist.new_group([0, 1], timeout=timedelta(seconds=17))
    assert groups.timeout_of(made) == 17.0
    silent: Any = object()
    assert groups.timeout_of(silent) == 1800.0


@on_ranks(4)
def test_named(rank: int) -> None:
    """Ranks that are in another number of groups make one, and the others do not call."""
    dist.new_group([0, 1])
    if rank in (1, 2):
        with groups.named("test_named"):
            made: Any = dist.new_group([1, 2], use_local_synchronization=True, group_desc="a pair")
        assert (made.group_name, made.group_desc) == ("test_named", "a pair")
        assert dist.get_process_group_ranks(made) == [1, 2]
        total = torch.tensor(float(rank))
        dist.all_reduce(total, group=made)
        assert total.item() == 3.0
    with pytest.raises(ZeroDivisionError), groups.named("left"):
        raise ZeroDivisionError
    own: Any = dist.new_group([rank], use_local_synchronization=True)  # torch's names again
    assert own.group_name not in ("test_named", "left")


@on_ranks(2)
def test_named_binds_no_device_in_it(rank: int) -> None:
    world: Any = dist.group.WORLD
    before = world.bound_device_id
    world.bound_device_id = torch.device("cpu", 0)
    try:
        with groups.named("unbound"):
            assert world.bound_device_id is None
        assert world.bound_device_id == torch.device("cpu", 0)
    finally:
        world.bound_device_id = before


@on_ranks(2)
def test_by_name(rank: int) -> None:
    world: Any = dist.group.WORLD
    one: Any = torch.tensor(rank + 1.0)
    assert float(groups.by_name.all_reduce(one, "sum", world.group_name)) == 3.0
    assert float(groups.by_name.all_reduce(one, "max", world.group_name)) == 2.0


@on_ranks(2)
def test_root_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    assert groups.root_mesh(mesh["dp"]) == mesh
    assert groups.root_mesh(mesh) == mesh


def test_default_store_of_none() -> None:
    with pytest.raises(ValueError, match="not been initialized"):
        groups.default_store()


def test_fake_store() -> None:
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=groups.fake_store(), rank=0, world_size=4096)
    try:
        assert dist.get_world_size() == 4096
    finally:
        dist.destroy_process_group()
