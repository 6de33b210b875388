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
        if isinstance(child, FSDP) and child._handle is not None:
            _annotate(child)
            flat = child._handle.flat_param
            if child._handle._use_orig_params:
                for (name, holder, _), parameter in zip(flat._param_infos, flat._params or (), strict=True):
                    own[id(holder), name] = parameter
                for info, parameter in zip(flat._shared_param_infos, flat._shared_params or (), strict=True):
                    own[id(info[1]), info[0]] = parameter
    return own


def _annotate(fsdp: Any) -> None:
    handle, flat = fsdp._handle, fsdp._handle.flat_param
    axis = Axis.along(fsdp.process_group, "process_group")
    sharded = bool(handle.uses_sharded_strategy)
    label = f"FSDP1 {fsdp.sharding_strategy.name}" + (f" over {axis.name}" if sharded else "")
    home = _home(axis, getattr(fsdp, "_inter_node_pg", None))
    shards = (axis,) if sharded and axis.size > 1 else ()

    def write(parameter: Tensor, shape: tuple[int, ...], units: int, stretches: tuple[Stretch, ...]) -> None:
        setattr(
            parameter,
            MANAGED,
            Declaration(label, shards, home, shape=shape, units=units, stretches=stretches),
        )

    pieces, unit = [], 0
    for i, shape in enumerate(flat._shapes):
        units = shape[0] if len(shape) > 1 else 1
        pieces.append((unit, units, _stretch(handle, i, tuple(shape), sharded)))
        unit += units
    whole = tuple(replace(s, unit=first + s.unit) for first, _, s in pieces if s is not None)
    write(flat, tuple(flat._unpadded_unsharded_size), unit, whole)
    if handle._use_orig_params:
        for parameter, shape, (_, units, piece) in zip(flat._params, flat._shapes, pieces, strict=True):
            # A parameter of its own begins where it begins; unsharded it even has its shape.
            own = () if piece is None else (replace(piece, start=0),)
            write(parameter, tuple(shape), units, own)


def _stretch(handle: Any, i: int, shape: tuple[int, ...], sharded: bool) -> Stretch | None:
    """What this rank holds of the i-th parameter of a flat one, None for nothing."""
    row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    if sharded:
        info = handle.flat_param._shard_param_infos[i]
        if not info.in_shard:
            return None
        start, count, begin = info.offset_in_shard, info.numel_in_shard, info.intra_param_start_idx
    else:
        start, count, begin = sum(handle.flat_param._numels_with_padding[:i]), math.prod(shape), 0
        if handle._use_orig_params:
            start = 0
    return Stretch((row,), begin // row, begin % row, start, count) if row else None


def _home(shard: Axis, across: dist.ProcessGroup | None) -> Home | None:
    """The ranks of the instance: the shard group, or with hybrid sharding the job, where it fills it."""
    if across is None or across.size() == 1:
        return Home(tuple(sorted(shard.ranks)), shard.group_name)
    if shard.size * across.size() == dist.get_world_size():
        return Home(tuple(range(dist.get_world_size())))
    return None
