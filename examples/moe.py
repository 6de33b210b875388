"""Experts of its own on every rank, beside dense layers that all ranks hold.

    torchrun --standalone --nproc-per-node 4 examples/moe.py

Tokens go each to the expert of their kind. Every third batch holds none of the last kind: that expert has no
gradient then, its rank joins all the same, and the norm is one on all ranks.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import distclip

WIDTH, TOKENS = 16, 24


class Exchange(torch.autograd.Function):
    """Sends ``sent[r]`` rows to rank r, and returns those that came; the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.back = (received, sent)
        arrived = rows.new_empty(sum(received), rows.size(1))
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Exchange.apply(gradient, *ctx.back), None, None


class MixtureOfExperts(nn.Module):
    """[tokens, WIDTH] -> the same; each token goes to one expert. Without tokens, it is not called."""

    def __init__(self, kinds: Tensor, rank: int) -> None:
        super().__init__()
        self.router, self.inlet = nn.Linear(*kinds.T.shape, bias=False), nn.Linear(WIDTH, WIDTH)
        self.router.weight.data.copy_(kinds)
        torch.manual_seed(1 + rank)
        self.expert = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gate, choice = self.router(x).softmax(-1).max(-1)
        order = choice.argsort()
        sent = choice.bincount(minlength=dist.get_world_size())
        dist.all_to_all_single(received := torch.empty_like(sent), sent)
        there, x = (sent.tolist(), received.tolist()), self.inlet(x)
        rows = Exchange.apply(x[order], *there)
        rows = Exchange.apply(self.expert(rows) if len(rows) else rows, *reversed(there))
        return x + gate[:, None] * rows[order.argsort()]


def train(device: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    kinds = 2 * F.normalize(torch.randn(ranks, WIDTH), dim=1)
    model = MixtureOfExperts(kinds, rank).to(device)
    distclip.declare(model.expert, sharded_over=mesh)  # router and inlet are seen to be replicas
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    say = print if rank == 0 else lambda *_: None
    say(clipper.describe())
    say("step | loss | whole gradient | distclip | each rank alone | expert has a gradient")
    for step in range(9):
        kind = torch.arange(TOKENS) % (ranks - 1 if step % 3 == 1 else ranks)
        x = (kinds[kind] + 0.3 * torch.randn(TOKENS, WIDTH)).to(device)
        loss = 10 * F.mse_loss(model(x), x.roll(1, dims=1).abs())
        optimizer.zero_grad()
        (loss / ranks).backward()  # the mean over all ranks: an expert gets its parts from all of them
        for parameter in [*model.router.parameters(), *model.inlet.parameters()]:
            dist.all_reduce(parameter.grad)
        present = [p.grad for p in model.parameters() if p.grad is not None]
        everyone: list[tuple[float, float, str]] = [(0.0, 0.0, "")] * ranks
        mine = (loss.item(), nn.utils.get_total_norm(present).item(), "yes" if len(present) > 3 else "no")
        dist.all_gather_object(everyone, mine)
        whole = clipper.verify()  # like the lines before, for this table only
        norm = clipper.clip().total_norm
        optimizer.step()
        mean, alone = sum(e[0] for e in everyone) / ranks, " ".join(f"{e[1]:.6f}" for e in everyone)
        say(f"{step} | {mean:.4f} | {whole:.6f} | {norm:.6f} | {alone} | {' '.join(e[2] for e in everyone)}")


if __name__ == "__main__":
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpus else "gloo")
    train("cuda" if gpus else "cpu")
    dist.barrier()
    gc.collect()  # gloo may abort where a graph outlives its process group
    dist.destroy_process_group()
