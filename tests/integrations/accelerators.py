"""Accelerators on the CPU, one after another in one process, with everything that Accelerate itself does.

Accelerate 1.15 turns an ``fsdp_plugin`` or a ``ParallelismConfig`` into FSDP or tensor parallelism only on an
accelerator device; on the CPU it falls back to DDP without a word. So for these ``accelerator("fsdp2")``
says, before anything is made, that the processes are those of a MULTI_GPU job whose device is the CPU. From
there it is Accelerate's own code: its state, ``prepare``, FSDP1 or ``fully_shard`` on a gloo mesh,
``backward``. For the same reason the float16 scaler, which it makes for accelerator devices only, is put in
by hand.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests import oracle
from tests.layouts import Even

WIDTH, BATCH = 8, 8
MAX_NORM = 0.5


def before_1_15(fault: str) -> pytest.MarkDecorator:
    """For tests in which Accelerate does by itself what an older one cannot."""
    old = tuple(map(int, version("accelerate").split(".")[:2])) < (1, 15)
    return pytest.mark.skipif(old, reason=f"Accelerate before 1.15 {fault}")


@contextlib.contextmanager
def accelerator(kind: str, *, fp16: float | None = None, **kwargs: Any) -> Iterator[Accelerator]:
    """``kind``: single, ddp, fsdp1, fsdp1_flat (without ``use_orig_params``), fsdp2, tp; on 4 ranks hsdp and
    fsdp2_tp. ``fp16``: loss scale."""
    with environment(kind != "single"):
        if kind not in ("single", "ddp"):
            pretend_gpus()
            kwargs |= _parallelism(kind)
        accelerator = Accelerator(cpu=kind in ("single", "ddp"), **kwargs)
        if fp16 is not None:
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            kind_of_scaler = ShardedGradScaler if kind.startswith("fsdp1") else GradScaler
            accelerator.scaler = kind_of_scaler("cpu", init_scale=fp16, growth_interval=1000)
        try:
            yield accelerator
        finally:
            accelerator.free_memory()


@contextlib.contextmanager
def environment(distributed: bool) -> Iterator[None]:
    """What accelerators find and leave, in the environment and in themselves: there is one state for the
    whole process. The process group stays."""
    ranks = {"LOCAL_WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"), "MASTER_ADDR": "localhost"}
    reset()
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **(ranks if distributed else {})}):
        try:
            yield
        finally:
            gc.collect()
            if dist.is_initialized():
                dist.barrier()
            reset()


def pretend_gpus() -> None:
    """The processes are those of a MULTI_GPU job, whose device is the CPU."""
    PartialState(cpu=True)
    PartialState._shared_state["device"] = torch.device("cpu")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _parallelism(kind: str) -> dict[str, Any]:
    sizes = {
        "hsdp": {"dp_replicate_size": 2, "dp_shard_size": 2},
        "tp": {"tp_size": 2},
        "fsdp2_tp": {"dp_shard_size": 2, "tp_size": 2},
    }
    options: dict[str, Any] = {}
    if kind in sizes:
        options["parallelism_config"] = ParallelismConfig(**sizes[kind])
    if kind.startswith("fsdp1"):
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=1,
            reshard_after_forward="FULL_SHARD",
            use_orig_params=kind == "fsdp1",
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Even"],
        )
    elif kind != "tp":
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Even"],
        )
    return options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Even(), Even()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """That of all ranks together."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, WIDTH, generator=generator), 5 * torch.randn(BATCH, 3, generator=generator)


def share(accelerator: Accelerator, kind: str) -> slice:
    """The rows of the batch that are this rank's."""
    rank, world = accelerator.process_index, accelerator.num_processes
    tensor_parallel = {"tp": world, "fsdp2_tp": 2}.get(kind, 1)
    return slice(rank // tensor_parallel, None, world // tensor_parallel)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    out = model(x)
    return 10 * F.mse_loss(out if out.dtype == torch.float64 else out.float(), target.to(out.dtype))


class Job:
    """A model that an accelerator has prepared, and this rank's part in training it."""

    def __init__(
        self, accelerator: Accelerator, kind: str, optimizer: Any = torch.optim.SGD, **kw: Any
    ) -> None:
        self.accelerator, self.kind = accelerator, kind
        model = net()
        if kind in ("tp", "fsdp2_tp"):
            mesh: DeviceMesh = accelerator.torch_device_mesh["tp"]
            for block in (model.first, model.second):
                parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            model.tp_size = 2  # as transformers notes on a model that it has made parallel
        options = {"lr": 0.05, "foreach": False, **kw}  # foreach cannot mix meshes
        if kind == "fsdp1_flat":  # whose parameters are made by prepare()
            self.model = accelerator.prepare(model)
            self.optimizer = accelerator.prepare(optimizer(self.model.parameters(), **options))
        elif kind == "fsdp2_tp":
            # What prepare() does, less a step for which Accelerate 1.15 imports what transformers 5.23 lacks.
            self.model = fsdp2_prepare_model(accelerator, model)
            accelerator._models.append(self.model)
            self.optimizer = accelerator.prepare_optimizer(optimizer(self.model.parameters(), **options))
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer(model.parameters(), **options))

    def backward(self, seed: int, rows: slice | None = None, bad: float | None = None) -> None:
        """``bad``: is added to the loss of the last rank, times a weight."""
        x, target = batch(seed)
        mine = share(self.accelerator, self.kind) if rows is None else rows
        loss = loss_of(self.model, x[mine], target[mine])
        if bad is not None and self.accelerator.process_index == self.accelerator.num_processes - 1:
            loss = loss * bad
        self.accelerator.backward(loss)

    def whole(self) -> dict[str, Tensor]:
        """Every parameter of the whole model in float64, on every rank."""
        full = contextlib.nullcontext()
        if isinstance(self.model, FSDP1):
            full = FSDP1.summon_full_params(self.model, writeback=False)
        with full:
            return {
                name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): oracle.dense(p)  # type: ignore[misc]
                for name, p in self.model.named_parameters()
            }


class Alone:
    """The same model in one process and float64, on the batch of all ranks: what is right."""

    def __init__(self, lr: float = 0.05) -> None:
        self.model, self.lr = net().double(), lr

    def backward(self, seed: int) -> None:
        x, target = batch(seed)
        self.model.zero_grad()
        loss_of(self.model, x.double(), target.double()).backward()

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def norm(self, p: float = 2.0, prefix: str = "") -> float:
        mine = [t for name, t in self.named.items() if name.startswith(prefix)]
        return oracle.norm(oracle.dense_gradients(mine), p)

    def scale(self, max_norm: float, prefix: str = "") -> None:
        coefficient = min(1.0, max_norm / (self.norm(prefix=prefix) + 1e-6))
        for name, p in self.named.items():
            if name.startswith(prefix):
                p.grad *= coefficient  # type: ignore[operator]

    @torch.no_grad()
    def step(self) -> None:
        for p in self.model.parameters():
            p -= self.lr * p.grad  # type: ignore[operator]

    def whole(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named.items()}


def plain(norm: Any) -> float:
    """A norm as Accelerate returns it, which may be a DTensor."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
