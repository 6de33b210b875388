"""One small model and its data, trained under every parallelism, and the same by one process in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests import oracle
from tests.layouts import Even, Layout, mesh1, mesh2

BATCH, WIDTH = 8, 8
POISONED = "0.up"  # whose output gets a bad gradient, on one rank


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Even(), Even())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks together, [BATCH, WIDTH], and its targets."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, BATCH, WIDTH, generator=generator).unbind()
    return x, 3 * target


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    out = out if out.dtype == torch.float64 else out.float()
    return 10 * F.mse_loss(out, target.to(out.dtype))


def unchanged(loss: Tensor) -> Tensor:
    return loss


@dataclass
class Spread:
    """A model as one rank holds it, with its share of every batch.

    Attributes:
        model: what the clipper is made from.
        share: which of ``shares`` parts of the batch this rank takes.
        culprit: whether it is this rank whose gradients go bad, where any do.
        stages: the pipeline, where it is one.
    """

    model: nn.Module
    share: int = 0
    shares: int = 1
    culprit: bool = True
    stages: DeviceMesh | None = None
    _bad: list[float] = field(default_factory=list)

    @property
    def kwargs(self) -> dict[str, Any]:
        return {} if self.stages is None else {"stages": self.stages}

    def mine(self, seed: int) -> tuple[Tensor, Tensor]:
        x, target = (t.chunk(self.shares)[self.share] for t in batch(seed))
        return x.to(next(self.model.parameters()).dtype), target

    def backward(
        self, seed: int, scale: Callable[[Tensor], Tensor] = unchanged, bad: float | None = None
    ) -> None:
        """``bad`` joins the gradient of one activation, on the culprit alone, and goes the way of all others
        from there."""
        self._bad[:] = [] if bad is None or not self.culprit else [bad]
        x, target = self.mine(seed)
        if self.stages is None:
            scale(loss_of(self.model(x), target)).backward()
            return
        mesh = self.stages
        index, count = mesh.get_local_rank(), mesh.size()
        stage = PipelineStage(self.model, index, count, torch.device("cpu"), group=mesh.get_group())
        # Not 1F1B, whose sends and receives of one go wait for each other over gloo in torch 2.6.
        mean = 1.0 if "scale_grads" in signature(ScheduleGPipe).parameters else 0.25  # 2.6 sums micro-batches
        schedule = ScheduleGPipe(stage, 4, lambda out, target: scale(loss_of(out, target) * mean))
        schedule.step(*([x] if index == 0 else []), **({"target": target} if index == count - 1 else {}))

    def poison(self, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            if self._bad and out.requires_grad:
                bad = self._bad[0]
                out.register_hook(lambda gradient: gradient + bad)

        module.register_forward_hook(hook)

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer; one for each mesh, which fused operators cannot mix."""
        by_mesh: dict[Any, list[Tensor]] = {}
        for p in self.model.parameters():
            by_mesh.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        return [{"params": params} for params in by_mesh.values()]

    def whole(self) -> dict[str, Tensor]:
        """Every parameter of the whole model in float64, on every rank."""
        full: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, FSDP1):
            full = FSDP1.summon_full_params(self.model, writeback=False)
        with full:
            own = {bare(name): oracle.dense(p) for name, p in self.model.named_parameters()}
        if self.stages is None:
            return own  # type: ignore[return-value]
        everyone: list[Any] = [None] * self.stages.size()
        stage = self.stages.get_local_rank()
        own = {f"{stage}.{name}": p for name, p in own.items()}
        dist.all_gather_object(everyone, own, group=self.stages.get_group())
        return {name: p for part in everyone for name, p in part.items()}


def bare(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def _finished(spread: Spread, whole: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> Spread:
    spread.poison(whole.get_submodule(POISONED))
    spread.model = wrap(whole)
    return spread


def single() -> Spread:
    return _finished(Spread(nn.Module()), model(), lambda m: m)


def ddp() -> Spread:
    rank, world = dist.get_rank(), dist.get_world_size()
    spread = Spread(nn.Module(), rank, world, rank == world - 1)
    return _finished(spread, model(), DistributedDataParallel)


def fsdp1(**options: Any) -> Spread:
    rank, world = dist.get_rank(), dist.get_world_size()
    spread = Spread(nn.Module(), rank, world, rank == world - 1)
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}

    def wrap(whole: nn.Module) -> nn.Module:
        for name, block in list(whole.named_children()):
            setattr(whole, name, FSDP1(block, **options))
        return FSDP1(whole, **options)

    return _finished(spread, model(), wrap)


def _fully_sharded(whole: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in whole.children():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(whole, mesh=mesh, **options)


def fsdp2(**options: Any) -> Spread:
    rank, world = dist.get_rank(), dist.get_world_size()
    spread = Spread(nn.Module(), rank, world, rank == world - 1)
    return _finished(spread, model(), lambda m: _fully_sharded(m, mesh1(world), **options))


def hsdp() -> Spread:
    spread = Spread(nn.Module(), dist.get_rank(), 4, dist.get_rank() == 3)
    return _finished(spread, model(), lambda m: _fully_sharded(m, mesh2(2, 2, "replicate", "shard")))


def fsdp2_tensor_parallel() -> Spread:
    mesh = mesh2(2, 2, "dp", "tp")
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    whole = parallelize_module(model(), mesh["tp"], plan)
    spread = Spread(nn.Module(), mesh["dp"].get_local_rank(), 2, dist.get_rank() == 3)
    return _finished(spread, whole, lambda m: _fully_sharded(m, mesh["dp"]))


def pipeline() -> Spread:
    """Two stages. The first goes bad, which the second does not see."""
    mesh = mesh1(2, "pp")
    stage = mesh.get_local_rank()
    spread = Spread(model()[stage], culprit=stage == 0, stages=mesh)
    if stage == 0:
        spread.poison(spread.model.up)  # type: ignore[arg-type]
    return spread


ROWS = {
    build.__name__: Layout(build.__name__, world, collectives, build)  # type: ignore[arg-type]
    for world, collectives, build in (
        (1, 0, single),
        (2, 0, ddp),
        (2, 1, fsdp1),
        (2, 1, fsdp2),
        (4, 1, hsdp),
        (4, 1, fsdp2_tensor_parallel),
        (2, 1, pipeline),
    )
}


def built(row: str) -> Spread:
    spread: Any = ROWS[row].build()
    return spread  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params, **kw: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01, **kw),
    "Adam": lambda params, **kw: torch.optim.Adam(params, lr=0.01, eps=1e-3, **kw),
    "AdamW": lambda params, **kw: torch.optim.AdamW(params, lr=0.01, eps=1e-3, **kw),
    "Adagrad": lambda params, **kw: torch.optim.Adagrad(params, lr=0.01, eps=1e-3, **kw),
}  # eps: where a gradient is hardly more than rounding, Adam would make a whole step of it
# Those whose fused kernel takes a coefficient. torch 2.11 has a fused Adagrad that does not.
DEFERRING = [
    name
    for name, make in OPTIMIZERS.items()
    if hasattr(make([nn.Parameter(torch.zeros(1))], fused=True), "_step_supports_amp_scaling")
]


def kind(*, fused: bool) -> dict[str, bool]:
    return {"fused": True} if fused else {"foreach": False}  # foreach cannot mix meshes


SCALERS: dict[str, Callable[..., GradScaler | None]] = {
    "no scaler": lambda **_: None,
    "GradScaler": lambda **kw: GradScaler("cpu", **kw),
    "ShardedGradScaler": lambda **kw: ShardedGradScaler("cpu", **kw),
}


def seeds(bad: Sequence[float | None]) -> Iterator[tuple[int, float | None]]:
    """A batch for each step, and what goes wrong in it."""
    return enumerate(bad, start=100)


def trained_alone(
    bad: Sequence[float | None], optimizer: str, max_norm: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and gradient norms of one process in float64, which leaves the bad steps out (norm 0)."""
    net = model().double()
    opt = OPTIMIZERS[optimizer](net.parameters(), foreach=False)
    norms = []
    for seed, value in seeds(bad):
        if value is not None:
            norms.append(0.0)
            continue
        x, target = batch(seed)
        opt.zero_grad()
        loss_of(net(x.double()), target).backward()
        norms.append(oracle.norm(oracle.dense_gradients(net.parameters())))
        for p in net.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, max_norm / (norms[-1] + 1e-6))
        opt.step()
    return {name: p.detach() for name, p in net.named_parameters()}, norms
