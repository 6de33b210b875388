"""Where the elements of one parameter live: which ranks hold different ones, which the same.

A placement is a list of axes. Along a *shard* axis every rank holds other elements; along every other
axis all ranks hold the same ones. That is all that counting needs: among R ranks that are reduced
over, each element is held by ``R / Π|shard axis|`` ranks (its multiplicity).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.torch_private import dtensor, groups


@dataclass(frozen=True)
class Axis:
    """A mesh axis or a process group, as seen from this rank.

    Does not keep the group from being destroyed; and one that is made later under the same name is another.
    """

    name: str
    size: int
    group_name: str
    _group: weakref.ref[dist.ProcessGroup] = field(compare=False, repr=False)

    @staticmethod
    def along(given: dist.ProcessGroup | DeviceMesh, argument: str) -> Axis:
        """From what a user passes as a group.

        Raises:
            ValueError: a mesh of several axes, or a group that this rank is no member of.
            TypeError: neither a mesh nor a group.
        """
        if isinstance(given, DeviceMesh):
            if given.ndim != 1:
                raise ValueError(f"{argument}={given} has {given.ndim} axes: pass one of them, mesh['name']")
            return Axis.of_mesh(given, 0)
        if not isinstance(given, dist.ProcessGroup):
            raise TypeError(f"{argument}={given!r}: expected a ProcessGroup or a 1-D DeviceMesh")
        if not groups.is_living(given):
            raise ValueError(
                f"{argument}= is a process group that has been destroyed: pass one that there is now"
            )
        ranks = dist.get_process_group_ranks(given)
        if dist.get_rank() not in ranks:
            raise ValueError(
                f"{argument} spans ranks {_short(ranks)}, of which rank {dist.get_rank()} is none"
            )
        return Axis(f"ranks {_short(ranks)}", len(ranks), given.group_name, weakref.ref(given))

    @staticmethod
    def of_mesh(mesh: DeviceMesh, axis: int) -> Axis:
        name = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else f"axis {axis}"
        group = mesh.get_group(axis)
        return Axis(name, mesh.size(axis), group.group_name, weakref.ref(group))

    @property
    def group(self) -> dist.ProcessGroup:
        """
        Raises:
            ValueError: it has been destroyed.
        """
        group = self._group()
        if group is None or not groups.is_living(group):
            raise ValueError(
                f"the process group of {self.name} (named {self.group_name!r}) has been destroyed since it "
                "was passed: declare(), and stages= or process_group= of a new Clipper, with one of those "
                "that there are now"
            )
        return group

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def coordinate(self) -> int:
        """Where this rank stands along the axis."""
        return dist.get_rank(self.group)


@dataclass(frozen=True)
class Home:
    """Ranks that are known to hold a parameter between them. ``mesh`` is theirs, if they form one."""

    ranks: tuple[int, ...]  # sorted
    group_name: str | None = None  # of exactly these ranks, where one is known
    mesh: DeviceMesh | None = None

    @staticmethod
    def of_mesh(mesh: DeviceMesh) -> Home:
        ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
        member = mesh.ndim == 1 and mesh.get_coordinate() is not None
        return Home(ranks, mesh.get_group().group_name if member else None, mesh)


@dataclass(frozen=True)
class Placement:
    """How one parameter lies over the ranks.

    Attributes:
        shards: axes (longer than 1) along which ranks hold different elements.
        home: the ranks that are known to hold it; None for a plain tensor, which tells nothing of others.
        label: for people, e.g. ``Shard(0) on dp, Replicate() on tp``.
        mesh, torch_placements: of a DTensor (else None and empty).
        partial: axes along which the gradient of a plain parameter has yet to be summed.
        tied: the axis along which other pipeline stages hold a copy, or None.
        local: no other rank holds any part of it.
        within: the ranks that the DDP module of a plain parameter averages over.
    """

    shards: tuple[Axis, ...]
    home: Home | None
    label: str
    mesh: DeviceMesh | None = None
    torch_placements: tuple[Any, ...] = ()
    partial: tuple[Axis, ...] = ()
    tied: Axis | None = None
    local: bool = False
    within: Home | None = None

    @cached_property
    def num_shards(self) -> int:
        return math.prod(axis.size for axis in self.shards)


def distinct(placements: Sequence[Placement]) -> list[Placement]:
    """Each object once: parameters that lie alike mostly share one."""
    return list({id(p): p for p in placements}.values())


@dataclass(frozen=True)
class Stretch:
    """A part of a parameter that this rank holds, seen as rows of the whole.

    Attributes:
        row: shape of one row of the whole parameter, of which the flat stretch holds consecutive elements;
            () if the local tensor has whole or partial rows in its own dim 0; None if it is all one unit.
        unit: the first row held (of this parameter).
        skip: elements of that row which are held elsewhere.             # flat stretches only
        start, count: where the stretch lies in the local tensor.        # flat stretches only
    """

    row: tuple[int, ...] | None
    unit: int
    skip: int = 0
    start: int = 0
    count: int = 0

    def rows(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """First unit, number of units, and views of the tensors with the units as dim 0 (and another)."""
        if self.row is None:
            yield self.unit, 1, [t.reshape(1, -1) for t in tensors]
        elif self.row == ():
            yield self.unit, tensors[0].size(0), list(tensors)
        else:
            flat = [t.reshape(-1)[self.start : self.start + self.count] for t in tensors]
            length = math.prod(self.row)
            head = min((length - self.skip) % length, self.count)
            whole = (self.count - head) // length
            unit = self.unit
            for begin, units, size in (
                (0, 1, head),
                (head, whole, whole * length),
                (head + whole * length, 1, -1),
            ):
                end = self.count if size < 0 else begin + size
                if end > begin:
                    yield unit, units, [f[begin:end].view(units, -1) for f in flat]
                    unit += units


@dataclass(frozen=True)
class Declaration:
    """What is known of a plain tensor beside the tensor: by declaration, or by who manages it (FSDP1)."""

    label: str
    shards: tuple[Axis, ...] = ()
    home: Home | None = None
    partial: tuple[Axis, ...] = ()
    tied: Axis | None = None
    local: bool = False
    number: int = 0  # in the order of declaring
    shape: tuple[int, ...] | None = None  # of the whole parameter, where the tensor's own tells less
    units: int | None = None  # rows of the whole, likewise (a flat parameter has those of several)
    stretches: tuple[Stretch, ...] | None = None


# Attribute of a tensor that holds a Declaration, made by who manages it.
MANAGED = "_distclip_managed"
# Attribute that holds the gradient whose declared sum has been taken.
SUMMED = "_distclip_summed"


class PlacementReader:
    """Reads placements; each distinct (mesh, placements) is worked out once, however many parameters.

    Args:
        declared: by the id of the parameter.
        averaged: by the id of the parameter, the group of the DDP module that it is in.
    """

    def __init__(
        self, declared: Mapping[int, Declaration] | None = None, averaged: Mapping[int, Axis] | None = None
    ) -> None:
        self._declared, self._averaged = declared or {}, averaged or {}
        self._known: dict[tuple[int, tuple[Any, ...]], Placement] = {}
        self._under_ddp: dict[str, Placement] = {}

    def __call__(self, name: str, parameter: Tensor) -> Placement:
        if isinstance(parameter, DTensor):
            base = self._of_dtensor(name, parameter)
        elif (managed := getattr(parameter, MANAGED, None)) is not None:
            base = _of_managed(managed)
        elif (axis := self._averaged.get(id(parameter))) is not None:
            if axis.group_name not in self._under_ddp:
                home = Home(tuple(sorted(axis.ranks)), axis.group_name)
                self._under_ddp[axis.group_name] = Placement((), None, "plain", within=home)
            base = self._under_ddp[axis.group_name]
        else:
            base = _PLAIN
        declared = self._declared.get(id(parameter))
        return base if declared is None else _with_declaration(name, base, declared)

    def _of_dtensor(self, name: str, parameter: DTensor) -> Placement:
        spec = dtensor.spec(parameter)
        key = (id(spec.mesh), tuple(spec.placements))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _of_mesh(name, spec.mesh, tuple(spec.placements))
        return known


def _of_managed(managed: Declaration) -> Placement:
    if managed.shards or managed.home is None or len(managed.home.ranks) == 1:
        return Placement(managed.shards, managed.home, managed.label)
    return Placement((), None, managed.label, within=managed.home)  # copies, to be compared as DDP's are


_PLAIN = Placement((), None, "plain")


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
            shards.append(Axis.of_mesh(mesh, i))
    return Placement(tuple(shards), Home.of_mesh(mesh), ", ".join(words), mesh, placements)


def _with_declaration(name: str, base: Placement, declared: Declaration) -> Placement:
    known = {axis.group_name for axis in base.shards}
    if twice := [axis.name for axis in declared.shards if axis.group_name in known]:
        raise ValueError(
            f"{name} is declared sharded over {twice[0]}, over which it is placed {base.label} already: "
            "declare only what the tensor does not say"
        )
    if declared.partial and base.mesh is not None:
        raise ValueError(
            f"{name} is declared partial_over=, and has become a DTensor ({base.label}), whose gradient says "
            "itself where it is partial: declare it anew without partial_over="
        )
    for axis in (*declared.shards, *declared.partial, *([declared.tied] if declared.tied else ())):
        _ = axis.group  # raises, where it has been destroyed
    return Placement(
        shards=base.shards + tuple(axis for axis in declared.shards if axis.size > 1),
        home=base.home,
        label=declared.label if base.label == "plain" else f"{base.label}; {declared.label}",
        mesh=base.mesh,
        torch_placements=base.torch_placements,
        partial=tuple(axis for axis in declared.partial if axis.size > 1),
        tied=declared.tied,
        local=declared.local,
        within=None if declared.shards or declared.partial or declared.tied else base.within,
    )


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, as far as it is known on this rank."""
    managed = getattr(parameter, MANAGED, None)
    return tuple(parameter.shape) if managed is None or managed.shape is None else managed.shape


def whole_units(parameter: Tensor) -> int:
    """Rows of dim 0 of the whole parameter; 1 where it has one dim or none."""
    managed = getattr(parameter, MANAGED, None)
    if managed is not None and managed.units is not None:
        return int(managed.units)
    return parameter.shape[0] if parameter.dim() > 1 else 1


def resolve_group(name: str) -> dist.ProcessGroup:
    """
    Raises:
        ValueError: it has been destroyed.
    """
    try:
        return groups.resolve(name)
    except RuntimeError as error:
        raise ValueError(
            f"the process group named {name!r}, over which this is clipped, has been destroyed since: make a "
            "new Clipper, with a group that there is now"
        ) from error


def _short(ranks: list[int]) -> str:
    if len(ranks) > 4:
        return f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"
    return ", ".join(map(str, ranks))
