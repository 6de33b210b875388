"""What FSDP1 (``FullyShardedDataParallel``) knows of the parameters it manages, written on them.

Its parameters are plain tensors that hold this rank's part of a flat buffer and cannot tell so
themselves; the handles of the module can.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distclip.layout.placement import MANAGED, Axis, Declaration, Home, Stretch
from distclip.torch_private.fsdp import Flat, between_nodes, flat_of


def annotate_fsdp1(module: nn.Module) -> dict[tuple[int, str], Tensor]:
    """Write on every parameter that an FSDP1 instance inside ``module`` manages how it lies over ranks.

    Returns:
        The original parameters, where it keeps them, by the module (its id) and the name there: between a
        forward pass and its backward the module itself holds views of the gathered ones.
    """
    own: dict[tuple[int, str], Tensor] = {}
    if "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules:
        return own
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for child in module.modules():
        if isinstance(child, FSDP) and (flat := flat_of(child)) is not None:
            _annotate(child, flat)
            own |= {(id(holder), name): parameter for holder, name, parameter in flat.places()}
    return own


def _annotate(fsdp: Any, flat: Flat) -> None:
    axis = Axis.along(fsdp.process_group, "process_group")
    label = f"FSDP1 {fsdp.sharding_strategy.name}" + (f" over {axis.name}" if flat.sharded else "")
    home = _home(axis, between_nodes(fsdp))
    shards = (axis,) if flat.sharded and axis.size > 1 else ()

    def write(parameter: Tensor, shape: tuple[int, ...], units: int, stretches: tuple[Stretch, ...]) -> None:
        setattr(
            parameter,
            MANAGED,
            Declaration(label, shards, home, shape=shape, units=units, stretches=stretches),
        )

    pieces, unit = [], 0
    for i, shape in enumerate(flat.shapes):
        units = shape[0] if len(shape) > 1 else 1
        pieces.append((unit, units, _stretch(flat, i, shape)))
        unit += units
    whole = tuple(replace(s, unit=first + s.unit) for first, _, s in pieces if s is not None)
    write(flat.tensor, flat.whole, unit, whole)
    if flat.keeps_originals:
        for parameter, shape, (_, units, piece) in zip(flat.originals, flat.shapes, pieces, strict=True):
            # A parameter of its own begins where it begins; unsharded it even has its shape.
            own = () if piece is None else (replace(piece, start=0),)
            write(parameter, shape, units, own)


def _stretch(flat: Flat, i: int, shape: tuple[int, ...]) -> Stretch | None:
    """What this rank holds of the i-th parameter of a flat one, None for nothing."""
    row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    if flat.sharded:
        shard = flat.shard(i)
        if shard is None:
            return None
        start, count, begin = shard
    else:
        start, count, begin = 0 if flat.keeps_originals else flat.begin(i), math.prod(shape), 0
    return Stretch((row,), begin // row, begin % row, start, count) if row else None


def _home(shard: Axis, across: dist.ProcessGroup | None) -> Home | None:
    """The ranks of the instance: the shard group, or with hybrid sharding the job, where it fills it."""
    if across is None or across.size() == 1:
        return Home(tuple(sorted(shard.ranks)), shard.group_name)
    if shard.size * across.size() == dist.get_world_size():
        return Home(tuple(range(dist.get_world_size())))
    return None
