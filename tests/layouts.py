"""The table of placements. A new placement is one row; every law runs over it.

A row builds real parameters with real gradients: through DDP, FSDP2 or torch's tensor parallelism where
a module is the point, planted as DTensors where the mixture of meshes is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Case:
    """Parameters as a user passes them, and a way to leave gradients on them."""

    parameters: Any
    backward: Callable[[int], None]  # seed -> gradients
    keep: Any = None  # whatever has to stay alive

    @property
    def named(self) -> dict[str, Tensor]:
        if isinstance(self.parameters, nn.Module):
            return dict(self.parameters.named_parameters())
        return dict(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.named.values())


@dataclass(frozen=True)
class Layout:
    """One row: how many ranks, how many collectives a step may take, how to build it."""

    name: str
    world: int  # 1: no process group at all
    collectives: int
    build: Callable[[], Case] = field(repr=False)
    same_everywhere: bool = False  # every rank holds everything
    replicas_of_rank_1: tuple[int, ...] = (1,)  # ranks that a reduction over shards alone treats as one


LAYOUTS: dict[str, Layout] = {}


def layout(world: int, collectives: int, **kwargs: Any) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        LAYOUTS[build.__name__] = Layout(build.__name__, world, collectives, build, **kwargs)
        return build

    return register


class Net(nn.Module):
    """Uneven on purpose: 7 rows, 3 rows and 1 row do not divide by 2 or 4."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.outer = nn.Linear(7, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.outer(self.norm(F.gelu(self.inner(x))))))


class Even(nn.Module):
    """Two linear layers around nothing and two norms: what torch's tensor parallelism can split."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.after = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.down(F.relu(self.up(self.before(x)))))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return build()


def _trained(model: nn.Module, parameters: Any = None, width: int = 5, same_batch: bool = False) -> Case:
    """Gradients from a real backward pass; each rank its own batch, unless all must have the same."""

    def backward(seed: int) -> None:
        model.zero_grad()
        rank = dist.get_rank() if dist.is_initialized() and not same_batch else 0
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        out = model(torch.randn(4, width, generator=generator))
        out.float().pow(2).sum().mul(3.0).backward()

    return Case(model if parameters is None else parameters, backward, keep=model)


def _planted(tensors: dict[str, Tensor]) -> Case:
    """Gradients drawn whole from a seed, the same on every rank, and distributed as their parameter."""

    def backward(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in tensors.values():
            whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if hasattr(parameter, "device_mesh"):
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = whole

    return Case(list(tensors.items()), backward)


def dtensor(
    shape: tuple[int, ...], mesh: DeviceMesh, *placements: Any, dtype: torch.dtype = torch.float32
) -> Tensor:
    torch.manual_seed(sum(shape) + 17)
    return nn.Parameter(distribute_tensor(torch.randn(shape, dtype=dtype), mesh, list(placements)))


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(sum(shape) + 17)
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def mesh1(size: int, name: str = "dp") -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=(name,))


def mesh2(a: int, b: int, *names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (a, b), mesh_dim_names=names)


# --- one process ---------------------------------------------------------------------------------------


@layout(1, 0, same_everywhere=True)
def single() -> Case:
    return _trained(_seeded(Net))


@layout(1, 0, same_everywhere=True)
def single_mixed_dtypes() -> Case:
    return _planted(
        {
            "f32": plain(6, 5),
            "f64": plain(4, 3, dtype=torch.float64),
            "bf16": plain(7, 3, dtype=torch.bfloat16),
            "f16": plain(9, dtype=torch.float16),
            "c64": plain(3, 5, dtype=torch.complex64),
            "scalar": nn.Parameter(torch.tensor(2.0)),
            "empty": plain(0, 3),
        }
    )


# --- replicas ------------------------------------------------------------------------------------------


@layout(2, 0, same_everywhere=True)
def ddp() -> Case:
    return _trained(DistributedDataParallel(_seeded(Net)))


@layout(2, 0, same_everywhere=True)
def ddp_bucket_view() -> Case:
    return _trained(DistributedDataParallel(_seeded(Net), gradient_as_bucket_view=True))


@layout(2, 0, same_everywhere=True)
def dtensor_replicated() -> Case:
    mesh = mesh1(2)
    return _planted({"a": dtensor((5, 3), mesh, Replicate()), "b": dtensor((4,), mesh, Replicate())})


# --- FSDP2 ---------------------------------------------------------------------------------------------


def _fsdp2(mesh: DeviceMesh | None = None, *, nested: bool = True, **kwargs: Any) -> Case:
    model = _seeded(Net)
    if nested:
        for child in model.children():
            fully_shard(child, mesh=mesh, **kwargs)
    fully_shard(model, mesh=mesh, **kwargs)
    return _trained(model)


@layout(2, 1)
def fsdp2() -> Case:
    return _fsdp2(mesh1(2), nested=False)


@layout(2, 1)
def fsdp2_nested_uneven_empty() -> Case:
    return _fsdp2(mesh1(2))  # rank 1 holds nothing of the head


@layout(2, 1)
def fsdp2_bfloat16() -> Case:
    return _fsdp2(
        mesh1(2), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )


@layout(2, 1)
def fsdp2_cpu_offload() -> Case:
    return _fsdp2(mesh1(2), offload_policy=CPUOffloadPolicy(pin_memory=False))


@layout(4, 1)
def fsdp2_four_ranks() -> Case:
    return _fsdp2(mesh1(4))


@layout(4, 1, replicas_of_rank_1=(1, 3))
def hsdp() -> Case:
    return _fsdp2(mesh2(2, 2, "replicate", "shard"))


# --- tensor parallelism --------------------------------------------------------------------------------


@layout(2, 1)
def tensor_parallel() -> Case:
    model = _seeded(Even)  # the norms stay plain tensors
    parallelize_module(model, mesh1(2, "tp"), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _trained(model, width=8, same_batch=True)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = Even()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embed(tokens))


def _sequence_parallel(mesh: DeviceMesh) -> nn.Module:
    model = _seeded(_Tokens)
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "body.before": SequenceParallel(),
            "body.up": ColwiseParallel(input_layouts=Shard(1)),
            "body.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "body.after": SequenceParallel(),
            "body": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        },
    )
    parallelize_module(
        model, mesh, {"body": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1))}
    )
    return model


def _trained_on_tokens(model: nn.Module) -> Case:
    def backward(seed: int) -> None:
        model.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 11, (2, 6), generator=generator)
        target = torch.randn(2, 6, 8, generator=generator)
        (model(tokens) - target).pow(2).sum().mul(2.0).backward()

    return Case(model, backward)


@layout(2, 2)  # one sums the Partial gradients of the norms
def sequence_parallel() -> Case:
    return _trained_on_tokens(_sequence_parallel(mesh1(2, "tp")))


@layout(4, 1)
def fsdp2_tensor_parallel() -> Case:
    mesh = mesh2(2, 2, "dp", "tp")
    model = _seeded(Even)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])  # _StridedShard on (dp, tp); the norms are on dp alone

    def backward(seed: int) -> None:
        model.zero_grad()
        generator = torch.Generator().manual_seed(1000 * seed + mesh["dp"].get_local_rank())
        model(torch.randn(4, 8, generator=generator)).pow(3).sum().backward()

    return Case(model, backward)


# --- mixtures ------------------------------------------------------------------------------------------


@layout(2, 1)
def sharded_beside_plain() -> Case:
    return _planted({"sharded": dtensor((5, 3), mesh1(2), Shard(0)), "plain": plain(4, 3)})


@layout(4, 1)
def slices_of_one_mesh() -> Case:
    mesh = mesh2(2, 2, "a", "b")
    return _planted(
        {
            "on_a": dtensor((5, 3), mesh["a"], Shard(0)),
            "on_b": dtensor((3, 5), mesh["b"], Shard(1)),
            "on_both": dtensor((7, 6), mesh, Shard(0), Shard(1)),
            "twice": dtensor((9, 2), mesh, Shard(0), Shard(0)),
            "replicated": dtensor((4,), mesh, Replicate(), Replicate()),
            "half": dtensor((4, 4), mesh, Replicate(), Shard(0)),
            "plain": plain(3, 3),
        }
    )


@layout(4, 1)
def unrelated_meshes() -> Case:
    dense, experts = mesh1(4, "dp"), mesh2(2, 2, "edp", "ep")
    return _planted(
        {
            "dense": dtensor((9, 3), dense, Shard(0)),
            "experts": dtensor((4, 3, 2), experts, Shard(1), Shard(0)),
            "router": dtensor((3, 4), dense, Replicate()),
        }
    )


@layout(2, 1)
def sharded_mixed_dtypes() -> Case:
    mesh = mesh1(2)
    return _planted(
        {
            str(dtype): dtensor((5, 3), mesh, Shard(0), dtype=dtype)
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        }
    )


NAMES = list(LAYOUTS)
DISTRIBUTED = [name for name, row in LAYOUTS.items() if row.world > 1]
