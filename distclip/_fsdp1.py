"""What FSDP1 (``FullyShardedDataParallel``) knows of the parameters it manages, written on them.

Its parameters are plain tensors that hold this rank's part of a flat buffer and cannot tell so
themselves; the handles of the module can.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distclip._placement import MANAGED, Axis, Declaration, Home


def annotate_fsdp1(module: nn.Module) -> None:
    """Write on every parameter that an FSDP1 instance inside ``module`` manages how it lies over ranks."""
    if "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules:
        return
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for child in module.modules():
        if isinstance(child, FSDP) and child._handle is not None:
            _annotate(child)


def _annotate(fsdp: Any) -> None:
    handle, flat = fsdp._handle, fsdp._handle.flat_param
    axis = Axis.along(fsdp.process_group, "process_group")
    sharded = bool(handle.uses_sharded_strategy)
    label = f"FSDP1 {fsdp.sharding_strategy.name}" + (f" over {axis.name}" if sharded else "")
    home = _home(axis, getattr(fsdp, "_inter_node_pg", None))
    shards = (axis,) if sharded and axis.size > 1 else ()

    def write(parameter: Tensor, shape: tuple[int, ...]) -> None:
        setattr(parameter, MANAGED, Declaration(label, shards, home, shape=shape))

    write(flat, tuple(flat._unpadded_unsharded_size))
    if handle._use_orig_params:
        for parameter, shape in zip(flat._params, flat._shapes, strict=True):
            write(parameter, tuple(shape))


def _home(shard: Axis, across: dist.ProcessGroup | None) -> Home | None:
    """The ranks of the instance: the shard group, or with hybrid sharding the job, where it fills it."""
    if across is None or across.size() == 1:
        return Home(tuple(sorted(shard.ranks)), shard.group_name)
    if shard.size * across.size() == dist.get_world_size():
        return Home(tuple(range(dist.get_world_size())))
    return None
