"""Timing calls that take turns, in one process group."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.distributed as dist


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, from when all ranks are there until this one is done."""
    if dist.is_initialized():
        dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    restore: Callable[[], None] = lambda: None,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """The median over ``rounds`` of each call, in seconds, of the slowest rank each time.

    The calls take turns, and another one begins each round. ``prepare`` runs before each
    with its name, and ``restore`` after each, untimed.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            prepare(name)
            times[name].append(once(calls[name], device))
            restore()
    return {name: median(slowest(times[name], device)) for name in names}


def slowest(times: list[float], device: torch.device) -> list[float]:
    """Of all ranks, time by time."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return times
    everyone = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    return everyone.tolist()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
