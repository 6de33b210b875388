"""Process groups: those that there are, what they are reached through, and how one gets its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as by_name
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

__all__ = [
    "by_name", "default_store", "device_kinds", "fake_store", "is_living", "living", "named", "resolve",
    "root_mesh", "timeout_of",
]  # fmt: skip

# by_name: torch's module of collectives that take a group by its name, which is all that torch.compile knows
# of groups. In 2.6 already.

resolve: Callable[[str], dist.ProcessGroup] = _resolve_process_group  # type: ignore[assignment]
"""The group of that name; RuntimeError where there is none (any more). In 2.6 already; in newer releases the
name is of a NewType of str."""


def living() -> list[dist.ProcessGroup]:
    """Those that this rank is in and that have not been destroyed. In 2.6 already."""
    return list(c10d._world.pg_map)


def is_living(group: dist.ProcessGroup) -> bool:
    """Whether it has not been destroyed. In 2.6 already."""
    return group in c10d._world.pg_map


def default_store() -> dist.Store:
    """The store through which the ranks of the default group have met; ValueError where there is no such
    group. In 2.6 already."""
    return c10d._get_default_store()


def device_kinds(group: dist.ProcessGroup) -> list[str]:
    """The types of device that the group has a backend for. In 2.6 already."""
    return [device.type for device in group._device_types]


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a collective of the group waits. In 2.6 already, for gloo and NCCL; of a backend that does
    not say, torch's default."""
    try:
        device = group._device_types[0]
        limit: timedelta = group._get_backend(torch.device(device)).options._timeout
        return limit.total_seconds()
    except (RuntimeError, AttributeError, IndexError):
        return c10d.default_pg_timeout.total_seconds()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """In here ``dist.new_group(..., use_local_synchronization=True)`` makes a group of this name, for which
    only its own ranks call. In 2.6 already, by putting another function in the place of torch's.

    2.13 has no argument for the name, under which the ranks meet in the store, and no release before it that
    is known has: ``group_desc`` is a description beside it. torch itself takes a hash of the ranks and of how
    many groups this rank is in, which may be another number on each, and then they wait for each other for
    ever. Without ``use_local_synchronization`` it takes a count, and all ranks of the job have to call; with
    ``split_group`` all of the parent, on an accelerator, and it is the same hash. What takes a name is
    ``_new_process_group_helper``: no more promised, with half of the registration left to its caller.

    With a bound device NCCL would split the group from the world, for which ranks outside of it have to call:
    so none is bound in here.
    """
    world, naming = dist.group.WORLD, c10d._process_group_name
    assert world is not None
    bound = world.bound_device_id
    world.bound_device_id = None
    c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        yield
    finally:
        world.bound_device_id, c10d._process_group_name = bound, naming


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from, itself if from none. Since 2.8 a method; before, of a register
    that every mesh is in."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(mesh)


def fake_store() -> Any:
    """For ``init_process_group("fake", ...)``: a world of any size in one process, where nobody answers. In
    2.6 already; imported at need, since it is torch's own testing that it belongs to."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
