"""Which ranks a norm is taken over, and the process group that spans them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distclip.layout.placement import Axis, Home, Placement, distinct, resolve_group
from distclip.torch_private import groups

logger = logging.getLogger("distclip")


@dataclass(frozen=True)
class Scope:
    """The ranks that together hold the model, sorted, and how they fall into pipeline stages.

    Attributes:
        ranks: sorted. A world of one process has one.
        group_name: the group of exactly these ranks, where one is known.
        stages: the axis along which ranks hold other parameters, or None.
    """

    ranks: tuple[int, ...]
    group_name: str | None = None
    stages: Axis | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return self.stages.size if self.stages else 1

    @property
    def stage(self) -> int:
        return self.stages.coordinate if self.stages else 0

    @property
    def stage_size(self) -> int:
        """Ranks in each stage."""
        return self.size // self.num_stages

    def group(self) -> dist.ProcessGroup | None:
        """The process group of exactly these ranks (None for one rank alone); made at first need.

        A collective among these ranks where it must be made: to be called by all of them or by none.
        """
        if self.size == 1:
            return None
        return resolve_group(self.group_name) if self.group_name else _group_of(self.ranks)


def find_scope(
    placements: Sequence[Placement],
    process_group: dist.ProcessGroup | DeviceMesh | None,
    stages: dist.ProcessGroup | DeviceMesh | None,
) -> Scope:
    """The scope of parameters that lie so. Every rank in it comes to the same answer without talking.

    ``process_group`` if given; else the mesh that the DTensors live on (FSDP1: its group), or where
    several occur, or ``stages`` are an axis of it, their root mesh; else the default group; else this
    process alone.

    Raises:
        ValueError: homes that do not lie inside the largest of them, or that reach outside
            ``process_group``; stages that do not divide the scope; local parameters beside others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Scope((0,))
    placements = distinct(placements)
    if any(p.local for p in placements):
        if not all(p.local for p in placements):
            shared = next(p.label for p in placements if not p.local)
            raise ValueError(
                f"some parameters are declared local, others are not ({shared}): they have no norm in "
                "common; clip them in two calls"
            )
        return Scope((dist.get_rank(),))
    homes = _distinct([home for p in placements if (home := p.home or p.within) is not None])
    homes = _distinct([*homes, *(home for p in placements for home in _declared_homes(p))])
    if any(p.shards or p.partial or p.tied for p in placements if p.mesh is None and p.home is None):
        # Declared over a group of their own: DDP's is only the one that copies are averaged over.
        homes = [home for home in homes if home not in {p.within for p in placements}]
    if any(home.mesh is not None and home.mesh.get_coordinate() is None for home in homes):
        return Scope((dist.get_rank(),))  # not a member of the mesh: holds nothing, waits for nobody
    if stages is None:
        return _home_scope(homes, process_group, advise=True)
    axis = Axis.along(stages, "stages")
    if isinstance(stages, DeviceMesh):
        homes = _distinct([*homes, Home.of_mesh(groups.root_mesh(stages))])
    scope = _home_scope(homes, process_group, advise=False)
    if not set(axis.ranks) <= set(scope.ranks):
        # Homes of one stage alone: without a mesh in common, only the default group joins the stages.
        scope = _whole_world()
    if scope.size % axis.size:
        raise ValueError(
            f"{axis.size} stages do not divide the {scope.size} ranks in scope: pass process_group= with "
            "the ranks that hold this model"
        )
    return Scope(scope.ranks, scope.group_name, axis if axis.size > 1 else None)


def _declared_homes(placement: Placement) -> list[Home]:
    """What has a home may be declared to have parts outside of it too."""
    inside = set(placement.home.ranks) if placement.home is not None else None
    return [
        Home(tuple(sorted(axis.ranks)), axis.group_name)
        for axis in (*placement.shards, *placement.partial)
        if inside is not None and not set(axis.ranks) <= inside
    ]


def _home_scope(
    homes: Sequence[Home], process_group: dist.ProcessGroup | DeviceMesh | None, *, advise: bool
) -> Scope:
    if process_group is not None:
        axis = Axis.along(process_group, "process_group")
        ranks = tuple(sorted(axis.ranks))
        if outside := {rank for home in homes for rank in home.ranks} - set(ranks):
            raise ValueError(
                f"process_group spans {len(ranks)} ranks, but parameters also live on rank(s) "
                f"{sorted(outside)[:8]} outside it: pass a group that contains their meshes"
            )
        return Scope(ranks, axis.group_name)
    if not homes:
        return _whole_world()
    if len(homes) == 1:
        if advise:
            _advise_on_uncovered_axes(homes[0])
        return Scope(homes[0].ranks, homes[0].group_name)
    roots = [home if home.mesh is None else Home.of_mesh(groups.root_mesh(home.mesh)) for home in homes]
    largest = max(roots, key=lambda home: len(home.ranks))
    if any(not set(home.ranks) <= set(largest.ranks) for home in homes):
        raise ValueError(
            f"the parameters live on {len(homes)} sets of ranks, none of which contains the others "
            f"({', '.join(str(home.ranks[:8]) for home in homes[:4])}): pass process_group= with the ranks "
            "to reduce over"
        )
    return Scope(largest.ranks, largest.group_name)


def _distinct(homes: Sequence[Home]) -> list[Home]:
    """One home for each set of ranks (and mesh), in order of first appearance."""
    distinct: dict[tuple[int, ...], Home] = {}
    for home in {id(home): home for home in homes}.values():
        known = distinct.setdefault(home.ranks, home)
        if known.group_name is None and home.group_name is not None:
            distinct[home.ranks] = home
    return list(distinct.values())


def _whole_world() -> Scope:
    return Scope(tuple(range(dist.get_world_size())), _world().group_name)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # callers have seen is_initialized()
    return world


_made: Counter[tuple[int, ...]] = Counter()  # a name is never used twice


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if len(ranks) == dist.get_world_size():
        return _world()
    # The registry of torch keeps the group, so that it dies with the process group it belongs to: a
    # reference of ours would outlive destroy_process_group().
    name = f"distclip:{hash(ranks):x}"
    for group in groups.living():
        if group.group_desc == name and tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    _made[ranks] += 1
    with groups.named(f"{name}:{_made[ranks]}"):
        made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
    return made


def _advise_on_uncovered_axes(home: Home) -> None:
    if home.mesh is None or len(home.ranks) == 1:
        return
    root = groups.root_mesh(home.mesh)
    if root.size() == home.mesh.size() or dist.get_rank() != 0:
        return
    logger.warning(  # and not warnings: one that is made an error would be raised on this rank alone
        "all parameters live on %s, a part of %s: the norm is taken over those %d ranks alone. If the other "
        "ranks hold other parts of the same model (pipeline stages), pass stages=; if they hold replicas or "
        "other models, say so with process_group=.", home.mesh, root, len(home.ranks),
    )  # fmt: skip


def message_device(
    group: dist.ProcessGroup | None, tensors: Sequence[torch.Tensor], *, accelerated: bool = False
) -> torch.device:
    """The device on which the packed sums travel: the parameters' own where the group can reduce
    there, else the group's (CPU-offloaded gradients under NCCL: only the packed vector moves).

    A group may have one backend for the CPU and another for accelerators: ``accelerated`` says that some rank
    has parameters there, so that one without any joins it and does not wait in the other.
    """
    own = next((t.device for t in tensors if not t.is_cpu), None)
    if group is None:
        return own or torch.device("cpu")
    reachable = groups.device_kinds(group)
    if own is not None and own.type in reachable:
        return own
    elsewhere = [kind for kind in reachable if kind != "cpu"]
    if "cpu" in reachable and not (own is None and accelerated and elsewhere):
        return torch.device("cpu")
    return torch.device(elsewhere[0])


def first_message_device(group: dist.ProcessGroup | None, tensors: Sequence[torch.Tensor]) -> torch.device:
    """Where ranks send what they do not know of each other yet: of a kind that does not depend on what this
    one holds, and there on the GPU that it uses, which need not be torch's current one."""
    device = message_device(group, ())
    return next((t.device for t in tensors if t.device.type == device.type), device)
