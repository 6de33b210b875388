"""Who clips: distclip, torch, and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from distclip.bench.models import Model
from distclip.clipper import Clipper
from distclip.strategies.global_norm import GlobalNorm

Clip = Callable[[float], Tensor]
"""From ``max_norm`` to the norm before clipping."""


class Absent(Exception):
    """A peer that cannot take part, and why."""


def distclip(model: Model) -> Clip:
    clippers: dict[float, Clipper] = {}

    def clip(max_norm: float) -> Tensor:
        if max_norm not in clippers:
            clippers[max_norm] = Clipper(model.source, GlobalNorm(max_norm))
        return clippers[max_norm].clip().total_norm

    return clip


def torch_(model: Model) -> Clip:
    """FSDP1's own method for its modules, else ``torch.nn.utils.clip_grad_norm_``."""
    source = model.source
    if isinstance(source, FullyShardedDataParallel):
        return lambda max_norm: source.clip_grad_norm_(max_norm)
    return lambda max_norm: torch.nn.utils.clip_grad_norm_(model.parameters, max_norm)


def accelerate(model: Model) -> Clip:
    if isinstance(model.source, FullyShardedDataParallel):
        raise Absent("calls the same method of FSDP1")
    accelerator = _imported("accelerate").Accelerator(cpu=model.locals[0].device.type == "cpu")
    return lambda max_norm: accelerator.clip_grad_norm_(model.parameters, max_norm)


def torchtitan(model: Model) -> Clip:
    clip = _imported("torchtitan.distributed.utils").clip_grad_norm_
    return lambda max_norm: clip(model.parameters, max_norm)


def megatron(model: Model) -> Clip:
    if model.locals[0].device.type != "cuda":
        raise Absent("needs CUDA")
    clip_grads = _imported("megatron.core.optimizer.clip_grads")

    def clip(max_norm: float) -> Tensor:
        norm = clip_grads.get_grad_norm_fp32(model.locals, grad_stats_parallel_group=_everyone())
        clip_grads.clip_grad_by_total_norm_fp32(model.parameters, max_norm, norm)
        return torch.tensor(norm)

    return clip


def _everyone() -> Any:
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever an installation may lack
        raise Absent(f"{type(error).__name__}: {error}".splitlines()[0]) from None


CONTENDERS: dict[str, Callable[[Model], Clip]] = {
    "distclip": distclip,
    "torch": torch_,
    "accelerate": accelerate,
    "torchtitan": torchtitan,
    "megatron": megatron,
}
