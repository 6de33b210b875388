"""Random models on four ranks, laid out in some way, and what the test itself knows of where pieces lie.

Nothing here asks distclip: a piece of a gradient is known by the name of its parameter, the pipeline stage,
and the coordinates of this rank along the axes that the parameter is cut over. Equal keys are copies, others
are other elements.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.layouts import mesh1, mesh2

SIZE = 4


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.body = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, *, without_body: bool = False) -> Tensor:
        x = self.norm(self.first(x))
        for layer in () if without_body else self.body:
            x = x + layer(x).relu()
        return self.head(x) * self.gain


@dataclass
class World:
    """What one rank holds.

    Attributes:
        mates: the ranks that clip together with this one.
        circle: those of them that the message of a step goes to, where some parameter is cut.
        own: modules and parameters of which this rank holds other elements than others, and its coordinate.
        flat: this rank's coordinate among those that FSDP1 shards over, None where it does not.
        synchronised: gradients come right out of a backward pass on batches that differ.
        mesh: over which layers can be sharded afterwards.
    """

    kind: str
    models: list[nn.Module]
    mates: tuple[int, ...] = (0, 1, 2, 3)
    circle: tuple[int, ...] = (0, 1, 2, 3)
    kwargs: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    own: list[tuple[nn.Module | Tensor, int]] = field(default_factory=list)
    flat: int | None = None
    synchronised: bool = False
    trained: bool = False  # gradients come from a backward pass
    mesh: Any = None
    ep: Any = None
    keep: list[Any] = field(default_factory=list)
    said: list[nn.Module | Tensor] = field(default_factory=list)  # of which something has been declared since
    _ever_own: list[tuple[Tensor, int]] = field(default_factory=list)  # which lists may hold on

    def nets(self) -> list[Any]:
        """The models without their wrappers."""
        return [m.module if isinstance(m, DistributedDataParallel | FSDP1) else m for m in self.models]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for i, model in enumerate(self.models):
            for name, p in model.named_parameters():
                yield f"{i}.{name}", p

    def piece_of(self, tensor: Tensor) -> tuple[int, ...]:
        """This rank's coordinates along the axes that the parameter is cut over; () of copies."""
        piece: tuple[int, ...] = ()
        if isinstance(tensor, DTensor):
            at = tensor.device_mesh.get_coordinate()
            assert at is not None
            piece = tuple(c for c, p in zip(at, tensor.placements, strict=True) if not p.is_replicate())
        elif self.flat is not None:
            piece = (self.flat,)
        for item, coordinate in self.own:
            inside = [item] if isinstance(item, Tensor) else list(item.parameters())
            self._ever_own += [
                (p, coordinate) for p in inside if all(p is not known for known, _ in self._ever_own)
            ]
        return (*piece, *(c for p, c in self._ever_own if p is tensor))

    def fill(self, tensors: list[tuple[str, Tensor]], seed: int, scale: float) -> None:
        """Gradients from a seed: copies get the same, other pieces others."""
        for name, p in tensors:
            if not p.requires_grad:
                p.grad = None
                continue
            local = p.to_local() if isinstance(p, DTensor) else p
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{seed} {name} {self.stage} {self.piece_of(p)}".encode())
            )
            g = torch.randn(local.shape, generator=generator).mul_(scale).to(p.dtype)
            p.grad = like(p, g)

    def train(self, seed: int, *, apart: bool = False, without_body: bool = False) -> None:
        """``apart``: another batch on every rank."""
        number = dist.get_rank() if apart else 0
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1000 * seed + number))
        loss: Any = 0.0
        for model in self.models:
            dtype = next(model.parameters()).dtype
            loss = loss + model(x.to(dtype), without_body=without_body).double().pow(2).sum()
        loss.backward()

    def evaluate(self) -> None:
        with torch.no_grad():
            for model in self.models:
                model(torch.ones(2, 4, dtype=next(model.parameters()).dtype))


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """``local`` as this rank's piece of a gradient of the parameter."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def local_of(gradient: Tensor) -> Tensor:
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


WORLDS: dict[str, tuple[int, Callable[[random.Random], World]]] = {}


def world(weight: int) -> Callable[[Callable[[random.Random], World]], Callable[[random.Random], World]]:
    def register(build: Callable[[random.Random], World]) -> Callable[[random.Random], World]:
        WORLDS[build.__name__] = (weight, build)
        return build

    return register


def draw(rng: random.Random) -> World:
    kinds, weights = list(WORLDS), [w for w, _ in WORLDS.values()]
    kind = rng.choices(kinds, weights)[0]
    torch.manual_seed(rng.randrange(1 << 30))
    return WORLDS[kind][1](rng)


@world(2)
def replicas(rng: random.Random) -> World:
    return World("replicas", [Net(rng.choice([4, 8]))])


@world(2)
def ddp(rng: random.Random) -> World:
    # Not every layer takes part in each backward pass here.
    model = DistributedDataParallel(
        Net(), find_unused_parameters=True, gradient_as_bucket_view=rng.random() < 0.5
    )
    return World("DDP", [model], synchronised=True, trained=rng.random() < 0.7)


@world(2)
def ddp_of_a_part(rng: random.Random) -> World:
    mesh = mesh2(2, 2, "replicate", "shard")
    mates = tuple(dist.get_process_group_ranks(mesh.get_group("shard")))
    group = mesh.get_group("shard")
    torch.manual_seed(mates[0])
    model = DistributedDataParallel(Net(4 + 2 * mates[0]), process_group=group, find_unused_parameters=True)
    return World(
        "DDP on two ranks each", [model], mates, mates, synchronised=True, trained=rng.random() < 0.7
    )


@world(1)
def fsdp1(rng: random.Random) -> World:
    original = rng.random() < 0.7
    model = FSDP1(Net(), device_id=torch.device("cpu"), use_orig_params=original)
    return World(f"FSDP1 {original=}", [model], flat=dist.get_rank(), synchronised=True, trained=True)


def _sharded(mesh: Any, model: Any, *, nested: bool) -> nn.Module:
    for layer in (model.first, *model.body, model.head) if nested else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@world(4)
def fsdp2(rng: random.Random) -> World:
    mesh = mesh1(SIZE)
    model = _sharded(mesh, Net(), nested=rng.random() < 0.5)
    return World("FSDP2", [model], synchronised=True, trained=rng.random() < 0.4, mesh=mesh)


@world(2)
def hsdp(rng: random.Random) -> World:
    mesh = mesh2(2, 2, "replicate", "shard")
    circle = tuple(dist.get_process_group_ranks(mesh.get_group("shard")))
    model = _sharded(mesh, Net(), nested=False)
    return World("HSDP", [model], circle=circle, synchronised=True, trained=rng.random() < 0.4, mesh=mesh)


def _split(mesh: Any, model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh, {"body.0": ColwiseParallel(), "body.1": RowwiseParallel()})


@world(2)
def tensor_parallel(rng: random.Random) -> World:
    return World("TP", [_split(mesh1(SIZE, "tp"), Net())])


@world(1)
def tensor_parallel_of_a_part(rng: random.Random) -> World:
    mesh = mesh2(2, 2, "dp", "tp")["tp"]
    mates = tuple(dist.get_process_group_ranks(mesh.get_group()))
    return World("TP on two ranks each", [_split(mesh, Net())], mates, mates)


@world(3)
def dtensors(rng: random.Random) -> World:
    """Each parameter anywhere, or plain; one is cut over both axes."""
    mesh = mesh2(2, 2, "a", "b")
    model = Net()
    for name, p in list(model.named_parameters()):
        dim = rng.randrange(p.dim())
        on, placements = rng.choice(
            [
                (mesh["a"], [Shard(dim)]),
                (mesh["b"], [Shard(dim)]),
                (mesh, [Shard(dim), Replicate()]),
                (mesh, [Replicate(), Shard(dim)]),
                (mesh, [Shard(dim), Shard(dim)]),
                (mesh, [Replicate(), Replicate()]),
                (None, []),
            ]
        )
        if name == "first.weight":
            on, placements = mesh, [Shard(0), Shard(1)]
        if on is not None:
            path, _, leaf = name.rpartition(".")
            sharded = nn.Parameter(distribute_tensor(p.detach(), on, placements))
            setattr(model.get_submodule(path), leaf, sharded)
    return World("DTensors", [model], mesh=mesh["a"])


@world(2)
def fsdp2_tensor_parallel(rng: random.Random) -> World:
    mesh = mesh2(2, 2, "dp", "tp")
    model = _split(mesh["tp"], Net())
    return World("FSDP2 with TP", [_sharded(mesh["dp"], model, nested=rng.random() < 0.5)], mesh=mesh["dp"])


@world(2)
def pipeline(rng: random.Random) -> World:
    """Four stages."""
    mesh = mesh1(SIZE, "pp")
    stage = mesh.get_local_rank()
    torch.manual_seed(70 + stage)
    return World("4 stages", [Net(4 + 2 * stage)], kwargs={"stages": mesh.get_group()}, stage=stage)


@world(2)
def pipeline_and_data(rng: random.Random) -> World:
    mesh = mesh2(2, 2, "pp", "dp")
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(70 + stage)
    model: nn.Module = Net(4 + 4 * stage)
    circle = tuple(dist.get_process_group_ranks(mesh.get_group("pp")))
    which = rng.choice(["plain", "DDP", "one stage sharded", "sharded"])
    if which == "sharded" or (which == "one stage sharded" and stage == 1):
        model = _sharded(mesh["dp"], model, nested=False)
    elif which == "DDP":
        model = DistributedDataParallel(
            model, process_group=mesh.get_group("dp"), find_unused_parameters=True
        )
    if "sharded" in which:
        circle = (0, 1, 2, 3)
    return World(f"2 stages, {which}", [model], circle=circle, kwargs={"stages": mesh["pp"]}, stage=stage)


@world(3)
def experts(rng: random.Random) -> World:
    """Plain, and one layer another on every rank, or on every second one."""
    if rng.random() < 0.5:
        group, mesh = dist.group.WORLD, None
        assert group is not None
        mine = dist.get_rank()
    else:
        mesh = mesh2(2, 2, "edp", "ep")
        group, mine = mesh.get_group("ep"), mesh["ep"].get_local_rank()
    model = Net()
    torch.manual_seed(90 + mine)
    model.expert = nn.Linear(4, 4)
    distclip.declare(model.expert, sharded_over=group)
    circle = tuple(dist.get_process_group_ranks(group))
    return World("experts", [model], circle=circle, own=[(model.expert, mine)], ep=group)


@world(3)
def two_models(rng: random.Random) -> World:
    mesh = mesh1(SIZE)
    models: list[nn.Module] = []
    for _ in range(2):
        which = rng.choice(["plain", "DDP", "FSDP2", "TP"])
        model: nn.Module = Net(rng.choice([4, 8]))
        if which == "DDP":
            model = DistributedDataParallel(model, find_unused_parameters=True)
        elif which == "FSDP2":
            model = _sharded(mesh, model, nested=rng.random() < 0.5)
        elif which == "TP":
            model = _split(mesh, model)
        models.append(model)
    return World("two models", models, mesh=mesh)
