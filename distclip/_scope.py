"""Which ranks a norm is taken over, and the process group that spans them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from distclip._placement import Placement, distinct_meshes, mesh_ranks, root_of


@dataclass(frozen=True)
class Scope:
    """The ranks that together hold the model, sorted. ``mesh`` or ``group`` spans them, if known.

    A world of one process has one rank and neither.
    """

    ranks: tuple[int, ...]
    given: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def group(self) -> dist.ProcessGroup | None:
        """The process group of exactly these ranks (None for one rank alone); made at first need.

        A collective among these ranks where it must be made: to be called by all of them or by none.
        """
        if self.size == 1:
            return None
        return self.given or _group_of(self.ranks)


def find_scope(
    placements: Sequence[Placement], process_group: dist.ProcessGroup | DeviceMesh | None
) -> Scope:
    """The scope of parameters that lie so. Every rank in it comes to the same answer without talking.

    ``process_group`` if given; else the mesh that the DTensors live on, or where several occur, their
    root mesh; else (no DTensor) the default group; else this process alone.

    Raises:
        ValueError: meshes that neither share a root nor lie inside the largest of them, or that reach
            outside ``process_group``: only the caller can say which ranks are meant.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Scope((0,))
    meshes = distinct_meshes(placements)
    if any(mesh.get_coordinate() is None for mesh in meshes):
        return Scope((dist.get_rank(),))  # not a member of the mesh: holds nothing, waits for nobody
    if process_group is not None:
        group = as_group(process_group, "process_group")
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        outside = set().union(*(mesh_ranks(m) for m in meshes)) - set(ranks) if meshes else set()
        if outside:
            raise ValueError(
                f"process_group spans {len(ranks)} ranks, but DTensor parameters also live on rank(s) "
                f"{sorted(outside)[:8]} outside it: pass a group that contains their meshes"
            )
        return Scope(ranks, group)
    if not meshes:
        return Scope(tuple(range(dist.get_world_size())), _world())
    if len(meshes) == 1:
        _advise_on_uncovered_axes(meshes[0])
        return _scope_of_mesh(meshes[0])
    roots = distinct_meshes([Placement((), root_of(m), "") for m in meshes])
    largest = max(roots, key=lambda m: m.size())
    ranks = mesh_ranks(largest)
    if any(not set(mesh_ranks(m)) <= set(ranks) for m in meshes):
        raise ValueError(
            f"the DTensor parameters live on {len(roots)} unrelated meshes, none of which contains the "
            f"others ({', '.join(map(str, roots))}): pass process_group= with the ranks to reduce over"
        )
    return _scope_of_mesh(largest)


def as_group(given: dist.ProcessGroup | DeviceMesh, argument: str) -> dist.ProcessGroup:
    """A ProcessGroup as it is, a 1-D DeviceMesh as its group."""
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(f"{argument}={given} has {given.ndim} axes: pass one axis of it, mesh['name']")
        return given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"{argument}={given!r}: expected a ProcessGroup or a 1-D DeviceMesh")
    return given


def _scope_of_mesh(mesh: DeviceMesh) -> Scope:
    return Scope(mesh_ranks(mesh), mesh.get_group() if mesh.ndim == 1 else None)


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if len(ranks) == dist.get_world_size():
        return _world()
    # The registry of torch keeps the group, so that it dies with the process group it belongs to: a
    # reference of ours would outlive destroy_process_group().
    name = f"distclip:{hash(ranks):x}"
    group: dist.ProcessGroup
    for group in c10d._world.pg_map:
        if group.group_desc == name and tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    group = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
    return group


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # callers have seen is_initialized()
    return world


def _advise_on_uncovered_axes(mesh: DeviceMesh) -> None:
    root = root_of(mesh)
    if root.size() == mesh.size() or mesh.size() == 1 or dist.get_rank() != 0:
        return
    warnings.warn(
        f"all parameters live on {mesh}, a part of {root}: the norm is taken over those "
        f"{mesh.size()} ranks alone. If the other ranks hold other parts of the same model (pipeline "
        "stages), pass stages=; if they hold replicas or other models, say so with process_group=.",
        stacklevel=2,
    )


def message_device(group: dist.ProcessGroup | None, tensors: Sequence[torch.Tensor]) -> torch.device:
    """The device on which the packed sums travel: the parameters' own where the group can reduce
    there, else the group's (CPU-offloaded gradients under NCCL: only the packed vector moves)."""
    own = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    if group is None:
        return own
    reachable = [d.type for d in group._device_types]
    if own.type in reachable:
        return own
    return torch.device(reachable[0])
