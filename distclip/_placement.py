"""Where the elements of one parameter live: which ranks hold different ones, which the same.

A placement is a list of axes. Along a *shard* axis every rank holds other elements; along every other
axis all ranks hold the same ones. That is all that counting needs: among R ranks that are reduced
over, each element is held by ``R / Π|shard axis|`` ranks (its multiplicity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Axis:
    """A mesh axis or a process group, as seen from this rank.

    Holds the group by name, so that a plan never keeps a process group from being destroyed.
    """

    name: str
    size: int
    group_name: str

    @staticmethod
    def along(group: dist.ProcessGroup, name: str) -> Axis:
        return Axis(name, group.size(), group.group_name)

    @property
    def group(self) -> dist.ProcessGroup:
        return resolve_group(self.group_name)


def resolve_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str in newer releases


@dataclass(frozen=True)
class Placement:
    """How one parameter lies over the ranks.

    Attributes:
        shards: axes (longer than 1) along which ranks hold different elements.
        mesh: the mesh of a DTensor, whose ranks are known to hold this parameter; None for a plain
            tensor, which says nothing about other ranks.
        label: for people, e.g. ``Shard(0) on dp, Replicate() on tp``.
        torch_placements: one per mesh axis (empty for a plain tensor).
    """

    shards: tuple[Axis, ...]
    mesh: DeviceMesh | None
    label: str
    torch_placements: tuple[Any, ...] = ()

    @property
    def num_shards(self) -> int:
        return math.prod(axis.size for axis in self.shards)


PLAIN = Placement((), None, "plain")


class PlacementReader:
    """Reads placements; each distinct (mesh, placements) is worked out once, however many parameters."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Any, ...]], Placement] = {}

    def __call__(self, name: str, parameter: Tensor) -> Placement:
        if not isinstance(parameter, DTensor):
            return PLAIN
        mesh, placements = parameter.device_mesh, tuple(parameter.placements)
        key = (id(mesh), placements)
        if key not in self._known:
            self._known[key] = _of_mesh(name, mesh, placements)
        return self._known[key]


def _of_mesh(name: str, mesh: DeviceMesh, placements: tuple[Any, ...]) -> Placement:
    shards, words = [], []
    for i, placement in enumerate(placements):
        axis_name = mesh.mesh_dim_names[i] if mesh.mesh_dim_names else f"axis {i}"
        if placement.is_partial():
            raise ValueError(
                f"{name} is a DTensor parameter placed {placement} on {axis_name}: a parameter must be "
                "sharded or replicated (only its gradient may be partial)"
            )
        words.append(f"{placement} on {axis_name}")
        # _StridedShard is no subclass of Shard, and says False to is_shard() in some releases.
        if not placement.is_replicate() and mesh.size(i) > 1 and mesh.get_coordinate() is not None:
            shards.append(Axis.along(mesh.get_group(i), axis_name))
    return Placement(tuple(shards), mesh, ", ".join(words), placements)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from, itself if from none."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch < 2.8

    return _mesh_resources.get_root_mesh(mesh)


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def distinct_meshes(placements: Sequence[Placement]) -> list[DeviceMesh]:
    """The meshes that occur, in order of first appearance."""
    by_id = {id(p.mesh): p.mesh for p in placements if p.mesh is not None}
    meshes: list[DeviceMesh] = []
    for mesh in by_id.values():
        if mesh not in meshes:
            meshes.append(mesh)
    return meshes
