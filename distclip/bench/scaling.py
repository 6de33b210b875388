"""Worlds that nobody has at hand: plans made on torch's fake process group, whose collectives do nothing.

One process plays rank 0. What it counts is exact, and what it times is this rank's own work; the time of real
collectives comes on top. The cost model that the counts confirm: neither the plan's messages (258 bytes a
parameter, three all-reduces, once) nor a step's (8 bytes, one all-reduce; 8 more for each norm that is asked
for) depend on the number of ranks, nor does a rank's own work (40 µs a parameter for the plan and 4 µs a
gradient of its own allocation for a step; 0.4 µs where gradients lie in one buffer). docs/bench.md has the
table.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distclip.clipper import Clipper
from distclip.strategies.global_norm import GlobalNorm
from distclip.torch_private.groups import fake_store

WORLDS = ((4, 2), (8, 8), (128, 8), (2048, 8))  # (dp, tp)
COUNTS = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Cost:
    """Of rank 0, for one world and number of parameters. Seconds and bytes.

    Attributes:
        plan: making the plan, once; plan_collectives, plan_bytes: what it sends for it.
        step: one clip of gradients of 4 elements, warm; step_collectives, step_bytes: what it sends.
        per_parameter_bytes: what a step sends with a norm for each parameter.
    """

    ranks: int
    parameters: int
    plan: float
    plan_collectives: int
    plan_bytes: int
    step: float
    step_collectives: int
    step_bytes: int
    per_parameter_bytes: int


def study(
    progress: Callable[[str], object] = lambda said: None,
    worlds: Sequence[tuple[int, int]] = WORLDS,
    counts: Sequence[int] = COUNTS,
) -> str:
    """The table: half of the parameters sharded over data and tensor parallel ranks, a quarter over data
    parallel ranks only, and a quarter plain and replicated."""
    lines = [
        "| ranks | parameters | plan | its messages | a step | its message | with a norm per parameter |",
        "|------:|-----------:|-----:|-------------:|-------:|------------:|--------------------------:|",
    ]
    for world in worlds:
        for number in counts:
            progress(f"{world[0] * world[1]} ranks, {number} parameters")
            c = cost(world, number)
            lines.append(
                f"| {c.ranks:,} | {c.parameters:,} | {c.plan:.2f} s | {c.plan_collectives} × all-reduce, "
                f"{_bytes(c.plan_bytes)} | {c.step * 1e3:.1f} ms | {c.step_collectives} × all-reduce, "
                f"{_bytes(c.step_bytes)} | {_bytes(c.per_parameter_bytes)} |"
            )
    return "\n".join(lines)


def cost(world: tuple[int, int], number: int) -> Cost:
    with _world(world) as mesh:
        dp = mesh["dp"]
        parameters = [_parameter(mesh, dp, i) for i in range(number)]
        clipper = Clipper(parameters, GlobalNorm(1e30))
        with _sent() as planning:
            start = time.perf_counter()
            _ = clipper.plan
            plan = time.perf_counter() - start
        for _ in range(4):  # at calls 1, 2, 4, 8, … plain copies are compared
            clipper.clip()
        gc.collect()
        start = time.perf_counter()
        with _sent() as stepping:
            clipper.clip()
        step = time.perf_counter() - start
        clipper.clip(param_norms=True)  # the first time, ranks agree that all do
        with _sent() as detailed:
            clipper.clip(param_norms=True)
        del clipper, parameters
        gc.collect()
    return Cost(
        world[0] * world[1], number, plan, len(planning), sum(planning), step, len(stepping), sum(stepping),
        sum(detailed),
    )  # fmt: skip


def _parameter(mesh: DeviceMesh, dp: DeviceMesh, i: int) -> Tensor:
    local = torch.ones(2, 2)
    if i % 4 == 3:
        parameter: Tensor = nn.Parameter(local)
        parameter.grad = torch.ones(2, 2)
        return parameter
    placed = (dp, [Shard(0)]) if i % 4 == 2 else (mesh, [Shard(0), Shard(1)])
    # (nn.Parameter would detach, and DTensor remembers that by a mesh that may be gone.)
    parameter = DTensor.from_local(local, *placed, run_check=False).requires_grad_(True)
    parameter.grad = DTensor.from_local(torch.ones(2, 2), *placed, run_check=False)
    return parameter


@contextmanager
def _world(extent: tuple[int, int]) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=extent[0] * extent[1])
    try:
        yield init_device_mesh("cpu", extent, mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


@contextmanager
def _sent() -> Iterator[list[int]]:
    """The bytes of each all-reduce from here on."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def recording(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = recording
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def _bytes(size: int) -> str:
    return f"{size} B" if size < 10_000 else f"{size / 1e3:.0f} kB" if size < 1e7 else f"{size / 1e6:.1f} MB"
