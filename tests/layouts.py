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
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
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

import distclip
from tests import oracle


@dataclass
class Case:
    """Parameters as a user passes them, and a way to leave gradients on them."""

    parameters: Any
    backward: Callable[[int], None]  # seed -> gradients
    keep: Any = None  # whatever has to stay alive
    kwargs: dict[str, Any] = field(default_factory=dict)  # stages=, process_group=
    gather: Callable[[str, Tensor], Tensor | None] | None = None  # the whole gradient, where it is no DTensor
    stage: str = ""  # prefix that tells the parameters of pipeline stages apart

    @property
    def named(self) -> dict[str, Tensor]:
        if isinstance(self.parameters, DistributedDataParallel):
            return dict(self.parameters.module.named_parameters())  # the user's own names
        if isinstance(self.parameters, nn.Module):
            return dict(self.parameters.named_parameters())
        return dict(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.named.values())

    def dense(self) -> dict[str, Tensor]:
        """Every whole gradient of the model, in float64, on every rank."""
        gather = self.gather or (lambda _, parameter: oracle.dense(parameter.grad))
        own = {name: gather(name, p) for name, p in self.named.items()}
        if not self.stage:
            return {name: g for name, g in own.items() if g is not None}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.stage, own))
        return {
            f"{stage}{name}": g
            for stage, grads in sorted(everyone, key=lambda e: e[0])
            for name, g in grads.items()
            if g is not None
        }


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


# Meshes are shared between tests: to make one makes process groups, which takes long.
MESHES: dict[tuple[tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}


def mesh(shape: tuple[int, ...], *names: str) -> DeviceMesh:
    if (shape, names) not in MESHES:
        MESHES[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return MESHES[shape, names]


def mesh1(size: int, name: str = "dp") -> DeviceMesh:
    return mesh((size,), name)


def mesh2(a: int, b: int, *names: str) -> DeviceMesh:
    return mesh((a, b), *names)


def mesh3(a: int, b: int, c: int, *names: str) -> DeviceMesh:
    return mesh((a, b, c), *names)


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


# --- FSDP1 (its CPU offload asks for an accelerator) ---------------------------------------------------


def pieces_over(*groups: dist.ProcessGroup) -> Callable[[str, Tensor], Tensor | None]:
    """Gathers what the ranks of the groups hold of a gradient, one piece after the other."""

    def gather(_: str, parameter: Tensor) -> Tensor | None:
        gradient = oracle.dense(parameter.grad)
        for group in groups:
            pieces: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(pieces, gradient, group=group)
            present = [p.flatten() for p in pieces if p is not None]
            gradient = torch.cat(present) if present else None
        return gradient

    return gather


def _fsdp1(*, nested: bool = True, ignored: tuple[str, ...] = (), **kwargs: Any) -> Case:
    model = _seeded(Net)
    left_out = [model.get_submodule(name) for name in ignored]
    for name, child in list(model.named_children()):
        if nested and name in ("inner", "outer"):
            setattr(model, name, FSDP1(child, device_id=torch.device("cpu"), **kwargs))
    wrapped = FSDP1(model, device_id=torch.device("cpu"), ignored_modules=left_out, **kwargs)
    sharded = "NO_SHARD" not in str(kwargs.get("sharding_strategy"))
    over = pieces_over(wrapped.process_group) if sharded else pieces_over()

    def gather(name: str, parameter: Tensor) -> Tensor | None:
        return oracle.dense(parameter.grad) if any(i in name for i in ignored) else over(name, parameter)

    case = _trained(wrapped)
    case.gather = gather
    if ignored:
        whole = case.backward

        def backward(seed: int) -> None:
            whole(seed)
            for module in left_out:  # nobody else synchronises them
                for parameter in module.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(dist.get_world_size())  # type: ignore[union-attr]

        case.backward = backward
    return case


@layout(2, 1)
def fsdp1_flat_parameters() -> Case:
    return _fsdp1()


@layout(2, 1)
def fsdp1_original_parameters() -> Case:
    return _fsdp1(use_orig_params=True)  # most are split across the ranks, some empty on one


@layout(4, 1)
def fsdp1_empty_shards() -> Case:
    return _fsdp1(use_orig_params=True, nested=True)


@layout(2, 1)
def fsdp1_shard_grad_op() -> Case:
    return _fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, use_orig_params=True)


@layout(2, 0, same_everywhere=True)
def fsdp1_no_shard() -> Case:
    return _fsdp1(sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True)


@layout(2, 1)
def fsdp1_ignored_modules() -> Case:
    return _fsdp1(use_orig_params=True, ignored=("norm", "head"))


@layout(2, 1)
def fsdp1_mixed_precision() -> Case:
    return _fsdp1(mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


@layout(4, 1, replicas_of_rank_1=(1, 3))
def fsdp1_hybrid() -> Case:
    mesh = mesh2(2, 2, "replicate", "shard")
    return _fsdp1(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh, use_orig_params=True)


@layout(4, 1, replicas_of_rank_1=(1, 3))
def fsdp1_hybrid_zero2() -> Case:
    return _fsdp1(
        sharding_strategy=ShardingStrategy._HYBRID_SHARD_ZERO2, device_mesh=mesh2(2, 2, "replicate", "shard")
    )


@layout(4, 1)
def fsdp1_nested_groups() -> Case:
    """Experts sharded over one axis, other experts along the other; the rest sharded over all."""
    mesh = mesh2(2, 2, "ep", "edp")
    model = _seeded(Net)
    torch.manual_seed(10 + mesh["ep"].get_local_rank())
    expert = nn.Linear(7, 3)
    cpu = torch.device("cpu")
    model.outer = FSDP1(expert, process_group=mesh.get_group("edp"), device_id=cpu, use_orig_params=True)
    wrapped = FSDP1(model, device_id=cpu, use_orig_params=True, ignored_states=[])
    distclip.declare(model.outer, sharded_over=mesh["ep"])
    everywhere, experts = (
        pieces_over(wrapped.process_group),
        pieces_over(mesh.get_group("edp"), mesh.get_group("ep")),
    )
    case = _trained(wrapped)
    case.gather = lambda name, p: experts(name, p) if "outer" in name else everywhere(name, p)
    return case


# --- declared ------------------------------------------------------------------------------------------


def _shard(whole: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    return whole.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()


class ManualTP(nn.Module):
    """A two-layer MLP split by hand as Megatron does, with plain tensors and autograd functions."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.LayerNorm(6)
        up, down = torch.randn(8, 6), torch.randn(6, 8)
        self.up = nn.Parameter(_shard(up, 0, mesh))
        self.up_bias = nn.Parameter(torch.zeros(self.up.shape[0]))  # zeros on every rank, and yet a shard
        self.down = nn.Parameter(_shard(down, 1, mesh))
        self.group = mesh.get_group()

    def forward(self, x: Tensor) -> Tensor:
        x = _CopyToRanks.apply(self.norm(x), self.group)
        return _SumOverRanks.apply(F.gelu(F.linear(x, self.up, self.up_bias)) @ self.down.T, self.group)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


@layout(2, 1)
def declared_tensor_parallel() -> Case:
    mesh = mesh1(2, "tp")
    model = ManualTP(mesh)
    for parameter in (model.up, model.up_bias, model.down):
        distclip.declare(parameter, sharded_over=mesh)
    over = pieces_over(mesh.get_group())
    case = _trained(model, width=6, same_batch=True)
    case.gather = lambda name, p: oracle.dense(p.grad) if "norm" in name else over(name, p)
    return case


@layout(2, 2)  # one sums the gradients of the norm
def declared_partial() -> Case:
    mesh = mesh1(2, "tp")
    norm, shard = nn.LayerNorm(4), plain(3, 4)
    with torch.no_grad():
        shard.add_(mesh.get_local_rank())
    distclip.declare(norm, partial_over=mesh)
    distclip.declare(shard, sharded_over=mesh)
    named = {"weight": norm.weight, "bias": norm.bias, "shard": shard}
    over = pieces_over(mesh.get_group())

    def backward(seed: int) -> None:
        torch.manual_seed(100 * seed + mesh.get_local_rank())
        for p in named.values():
            p.grad = None
        norm(torch.randn(5, 4)).pow(3).sum().backward()  # this rank's part of the sequence
        (shard * torch.randn(3, 4)).sum().backward()

    def gather(name: str, parameter: Tensor) -> Tensor | None:
        from distclip.measure.reduction import is_summed

        if name == "shard":
            return over(name, parameter)
        gradient = oracle.dense(parameter.grad)
        if gradient is not None and not is_summed(parameter):
            dist.all_reduce(gradient)
        return gradient

    return Case(list(named.items()), backward, keep=norm, gather=gather)


@layout(4, 1, replicas_of_rank_1=(1, 3))
def declared_experts() -> Case:
    """Plain experts: other ones along ep, copies along edp; the names tell the experts apart."""
    mesh = mesh2(2, 2, "edp", "ep")
    mine = mesh["ep"].get_local_rank()
    torch.manual_seed(20 + mine)
    expert = nn.Linear(4, 3)
    router = _seeded(lambda: nn.Linear(3, 2))
    distclip.declare(expert, sharded_over=mesh["ep"])
    over = pieces_over(mesh.get_group("ep"))
    named = {f"expert{mine}.{n}": p for n, p in expert.named_parameters()} | {
        f"router.{n}": p for n, p in router.named_parameters()
    }

    def backward(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in named.items():
            p.grad = torch.randn(p.shape, generator=generator) * (1 + mine if "expert" in name else 1)
        if seed == 4 and mine == 1:  # no token came to this expert
            for p in expert.parameters():
                p.grad = None

    case = Case(list(named.items()), backward, keep=(expert, router))
    case.gather = lambda name, p: over(name, p) if "expert" in name else oracle.dense(p.grad)
    return case


# --- pipelines -----------------------------------------------------------------------------------------


@layout(2, 1)
def pipeline() -> Case:
    """Stages of plain tensors: other names, other shapes, other numbers of them."""
    mesh = mesh1(2, "pp")
    stage = mesh.get_local_rank()
    torch.manual_seed(30 + stage)
    model: nn.Module = nn.Linear(4, 3) if stage == 0 else nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    case = _trained(model, width=4 if stage == 0 else 3)
    case.kwargs, case.stage = {"stages": mesh}, f"stage{stage}."
    return case


@layout(2, 1)
def pipeline_tied() -> Case:
    mesh = mesh1(2, "pp")
    stage = mesh.get_local_rank()
    tied = plain(6, 4)
    own = plain(3 + stage, 2)
    distclip.declare(tied, tied_over=mesh)
    named = {"embed" if stage == 0 else "head": tied, "own": own}

    def backward(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tied.grad = torch.randn(tied.shape, generator=generator)  # already summed over the stages
        own.grad = torch.randn(own.shape, generator=generator) + stage

    def gather(name: str, parameter: Tensor) -> Tensor | None:
        return None if name == "head" else oracle.dense(parameter.grad)

    return Case(list(named.items()), backward, kwargs={"stages": mesh}, stage=f"stage{stage}.", gather=gather)


@layout(4, 1, replicas_of_rank_1=(0, 1))
def pipeline_data_parallel() -> Case:
    """Plain stages with replicas: reduced over the stages alone."""
    mesh = mesh2(2, 2, "pp", "dp")
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(40 + stage)
    model = DistributedDataParallel(nn.Linear(5, 3 + stage), process_group=mesh.get_group("dp"))
    case = _trained(model)
    case.kwargs, case.stage = {"stages": mesh["pp"]}, f"stage{stage}."
    return case


@layout(4, 1)
def pipeline_one_stage_sharded() -> Case:
    """Stage 0 is plain and replicated, stage 1 sharded: both must choose the same group."""
    mesh = mesh2(2, 2, "pp", "dp")
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(50 + stage)
    model = nn.Linear(5, 4)
    if stage == 1:
        fully_shard(model, mesh=mesh["dp"])
    else:
        model = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    case = _trained(model)
    case.kwargs, case.stage = {"stages": mesh["pp"]}, f"stage{stage}."
    return case


@layout(8, 1)
def pipeline_fsdp2_tensor_parallel() -> Case:
    mesh = mesh3(2, 2, 2, "pp", "dp", "tp")
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(60 + stage)
    model = Even()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])

    def backward(seed: int) -> None:
        model.zero_grad()
        generator = torch.Generator().manual_seed(1000 * seed + 10 * stage + mesh["dp"].get_local_rank())
        model(torch.randn(4, 8, generator=generator)).pow(3).sum().backward()

    return Case(model, backward, kwargs={"stages": mesh["pp"]}, stage=f"stage{stage}.")


NAMES = list(LAYOUTS)
DISTRIBUTED = [name for name, row in LAYOUTS.items() if row.world > 1]
