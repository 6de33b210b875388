"""The plan: everything about clipping a set of parameters that does not change from step to step.

Built once, from the parameters. Building it may communicate (see ``ownership``); using it does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.decide.parameter_info import ParameterInfo
from distclip.layout.declarations import Declared
from distclip.layout.parameters import NamedParameter, order_in_modules
from distclip.layout.placement import Axis, Placement, PlacementReader, distinct, resolve_group
from distclip.layout.scope import Scope, find_scope, message_device
from distclip.planning.ownership import agree
from distclip.planning.rounding import Rounding


@dataclass(frozen=True, eq=False)
class Plan:
    """How a list of parameters lies over the ranks, and over which group their sums are reduced.

    It holds neither parameters nor process groups, so it keeps neither alive: who uses it passes the
    tensors of the list that it was made for.

    Attributes:
        parameters: those that train, each once.
        positions: where each stands in the list.                           # [num_parameters]
        placements: where the elements of each live.                        # [num_parameters]
        multiplicities: ranks of ``group`` that hold the same elements.     # [num_parameters]
        partial: by parameter index, the reduction that its gradient still needs per mesh axis.
        every: the parameters of all pipeline stages, in order of stages (tied copies are one; the shape of
            those in other stages is not known, and empty).
        rows: where this rank's own stand among them.                       # [num_parameters]
        group_name: the ranks that the per-step message is reduced over; None where every rank holds all
            of every parameter, so that nothing needs to be reduced.
        device: where the message and the norms live.
        frozen: positions of the parameters that did not require a gradient when the plan was made.
        first_device_type, first_dtype: of the first parameter that trains; of the first, where none does.
        compared: by parameter index, those whose gradients ranks compare now and then; None where only other
            ranks have some, and this one joins.
        proven: whether all of these had finite gradients on every rank when the plan was made.
        rounding: how far apart their copies have been said to be.
        wide: whether any is float64 (complex128), of which there are norms whose powers leave float64. Alike
            on all ranks: false for pipeline stages, which do not know each other's dtypes.
        apart: whether the message of a step goes to some ranks in scope, and not to all.
    """

    parameters: tuple[ParameterInfo, ...]
    positions: tuple[int, ...]
    placements: tuple[Placement, ...]
    multiplicities: tuple[int, ...]
    partial: dict[int, tuple[str, ...]]
    every: tuple[ParameterInfo, ...]
    rows: tuple[int, ...]
    scope: Scope
    group_name: str | None
    device: torch.device
    frozen: tuple[int, ...]
    first_device_type: str
    first_dtype: torch.dtype
    compared: tuple[int, ...] | None = ()
    proven: bool = True
    rounding: Rounding = field(default_factory=Rounding)
    wide: bool = False
    apart: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters of all stages."""
        return tuple(p.name for p in self.every)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.group_name is None else resolve_group(self.group_name)


def build_plan(
    named: Sequence[NamedParameter],
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    stages: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    alone: bool = False,
    everyone: bool = False,
    ordered: bool = False,
    averaged: Mapping[int, Axis] | None = None,
    settings: Mapping[str, str] | None = None,
    complaint: Exception | None = None,
    call: int = 0,
) -> Plan:
    """Plan the clipping of a list of parameters. To be called by every rank in scope, or by none.

    ``alone`` plans what needs no other rank, and does not talk: elementwise changes. ``everyone`` reduces
    over the whole scope, replicas too: for what differs between ranks that hold the same parameters.
    ``ordered``: what is measured depends on which is which. ``averaged``: by the id of a parameter, the group
    of its DDP module. ``settings``: what is to be the same on all ranks. ``complaint``: what has been found
    wrong on this rank, to be raised on all. ``call``: for the how manieth the plan is made anew.

    Raises:
        OwnershipError, SettingsError: on every rank, see ``ownership``.
        ValueError: see ``find_scope``.
    """
    positions: dict[int, int] = {}  # by identity: the same parameter twice is one
    for position, p in enumerate(named):
        positions.setdefault(id(p.tensor), position)
    trains = [i for i in positions.values() if _trains(named[i].tensor)]
    parameters = [named[i] for i in trains]
    placements: list[Placement] = []
    infos: list[ParameterInfo] = []
    homes: list[Placement] = []  # of those that do not train, where nothing does
    try:
        read = PlacementReader(Declared(named).of, averaged)
        for p in parameters:
            placements.append(read(p.name, p.tensor))
        infos = [p.info for p in parameters] if complaint is None else []
        homes = placements or [read(p.name, p.tensor) for p in named]
    except (ValueError, TypeError) as error:  # the others would wait
        complaint = complaint or error
        homes = placements
    scope = Scope((0,)) if alone else find_scope(homes, process_group, stages)
    if complaint is not None:
        if scope.size > 1:
            said = f"{type(complaint).__name__}: {complaint}"
            agree([], [], [], scope, settings or {}, None, said, call)
        raise complaint
    tensors = [p.tensor for p in parameters]
    first = (tensors or [p.tensor for p in named] or [torch.empty(())])[0]
    places = order_in_modules(tensors) if ordered and scope.size > 1 and _are_bare(infos) else None
    agreed = agree(parameters, infos, placements, scope, settings or {}, places, call=call)
    if everyone and scope.size > 1:
        group, size = scope.group(), scope.size
    else:
        group, size = _reduction_group(placements, scope, agreed.sharded)
    every = _told_apart(agreed.every)
    for i, row in enumerate(agreed.rows):
        if agreed.every[row].name == infos[i].name:  # a tied copy keeps its own
            infos[i] = replace(infos[i], name=every[row].name)
    return Plan(
        parameters=tuple(infos),
        positions=tuple(trains),
        placements=tuple(placements),
        multiplicities=tuple(
            size // (p.num_shards * scope.num_stages) * agreed.copies.get(i, 1)
            for i, p in enumerate(placements)
        ),
        partial=agreed.partial,
        every=every,
        rows=agreed.rows,
        scope=scope,
        group_name=None if group is None else group.group_name,
        device=message_device(group, tensors, accelerated=agreed.accelerated),
        frozen=tuple(sorted(set(positions.values()) - set(trains))),
        first_device_type=first.device.type,
        first_dtype=first.dtype,
        compared=agreed.comparable,
        proven=agreed.proven,
        rounding=agreed.rounding,
        wide=scope.stages is None and any(t.dtype in (torch.float64, torch.complex128) for t in tensors),
        apart=group is not None and group.size() < scope.size,
    )


def _are_bare(infos: Sequence[ParameterInfo]) -> bool:
    return any(info.name.startswith(("parameters[", "param_groups[")) for info in infos)


def _told_apart(infos: Sequence[ParameterInfo]) -> tuple[ParameterInfo, ...]:
    """Two models, or pipeline stages, may use the same names: the second to come is ``name#2``."""
    taken = {info.name for info in infos}
    seen: Counter[str] = Counter()
    apart = []
    for info in infos:
        seen[info.name] += 1
        if seen[info.name] > 1:
            number = next(n for n in count(seen[info.name]) if f"{info.name}#{n}" not in taken)
            seen[info.name] = number
            info = replace(info, name=f"{info.name}#{number}")
            taken.add(info.name)
        apart.append(info)
    return tuple(apart)


def _trains(tensor: Tensor) -> bool:
    return tensor.requires_grad or tensor.grad is not None


def _reduction_group(
    placements: Sequence[Placement], scope: Scope, sharded: bool
) -> tuple[dist.ProcessGroup | None, int]:
    """The smallest group known to exist whose sum is the whole: none, one axis, or the scope.

    Also its size. ``sharded``: whether any rank in scope holds a shard within its stage.
    """
    sharding = {axis.group_name: axis for p in distinct(placements) for axis in p.shards}
    if scope.size == 1:
        # Nothing is reduced: every multiplicity comes out as 1 or more, and is not asked for.
        return None, math.prod(axis.size for axis in sharding.values())
    if scope.stages is not None:
        return (scope.group(), scope.size) if sharded else (scope.stages.group, scope.stages.size)
    if not sharding:
        return None, 1
    if len(sharding) == 1:
        (axis,) = sharding.values()
        return axis.group, axis.size
    return scope.group(), scope.size
