"""Tensor parallelism by hand, with plain tensors that are declared; or by torch, which declares its own.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py --dtensor

Every rank keeps some rows of ``up``, some columns of ``down``, all of ``norm``: none alone has the norm.
"""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip


class SumOverRanks(torch.autograd.Function):
    """Sums over the ranks on the way forward, or on the way back; the other way it changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.summed, x = forward, x.clone()
        if forward:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return SumOverRanks.apply(gradient, not ctx.summed), None


class MLP(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32, bias=False)
        self.by_hand = by_hand  # torch's parallel layers come with their communication

    def forward(self, x: Tensor) -> Tensor:
        y = SumOverRanks.apply(self.norm(x), False) if self.by_hand else self.norm(x)
        y = self.down(F.gelu(self.up(y)))
        return x + (SumOverRanks.apply(y, True) if self.by_hand else y)


def split_by_hand(model: MLP, mesh: DeviceMesh) -> None:
    for parameter, dim in [(model.up.weight, 0), (model.up.bias, 0), (model.down.weight, 1)]:
        parameter.data = parameter.data.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
        distclip.declare(parameter, sharded_over=mesh)  # all that distclip has to be told


def norms_alone(model: nn.Module) -> str:
    """What each rank finds in its own gradients."""
    own = nn.utils.get_total_norm([getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return " ".join(f"{norm.item():.6f}" for norm in everyone)


def train(device: str, dtensor: bool) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    x, model = torch.randn(64, 32).to(device), MLP(by_hand=not dtensor).to(device)
    if dtensor:
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        split_by_hand(model, mesh)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, foreach=False)  # DTensors beside plain ones
    say = print if dist.get_rank() == 0 else lambda *_: None
    say(clipper.describe())
    say("step | loss | whole gradient | distclip | each rank alone")
    for step in range(8):
        loss = 10 * F.mse_loss(model(x), x.abs())
        loss.backward()
        whole, alone = clipper.verify(), norms_alone(model)  # for this table only
        norm = clipper.clip().total_norm
        optimizer.step()
        optimizer.zero_grad()
        say(f"{step} | {loss:.4f} | {whole:.6f} | {norm:.6f} | {alone}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tensor parallelism by hand, or by torch.")
    parser.add_argument("--dtensor", action="store_true", help="by torch's parallelize_module")
    dtensor = parser.parse_args().dtensor
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpus else "gloo")
    train("cuda" if gpus else "cpu", dtensor)
    dist.barrier()
    gc.collect()  # gloo may abort where a graph outlives its process group
    dist.destroy_process_group()
