"""A pipeline: every rank holds other layers, the first and the last both hold the embedding.

    torchrun --standalone --nproc-per-node 2 examples/pipeline.py
    torchrun --standalone --nproc-per-node 2 examples/pipeline.py --interleaved    # two stages on each rank

``stages=`` tells distclip that other ranks hold other parameters, ``tied_over=`` that two of them are one.
What a rank finds alone is the norm of its own layers; clipped by that, the copies of the embedding would
drift apart.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import distclip

WORDS, WIDTH, MICROBATCHES = 64, 32, 4


class Stage(nn.Module):
    """Tokens or activations [batch, WIDTH] -> activations, or at the end logits [batch, WORDS]."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.first, self.last = index == 0, index == count - 1
        torch.manual_seed(0)  # both copies start alike
        self.embedding = nn.Parameter(0.2 * torch.randn(WORDS, WIDTH)) if self.first or self.last else None
        torch.manual_seed(1 + index)
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.embedding(x, self.embedding) if self.first else x
        x = x + self.body(x)
        return x @ self.embedding.T if self.last else x


def train(device: str, interleaved: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("pp",))
    count = 2 * ranks if interleaved else ranks
    indices = range(rank, count, ranks)
    model = nn.ModuleList(Stage(index, count) for index in indices).to(device)
    stages = [
        PipelineStage(part, index, count, torch.device(device), group=mesh.get_group())
        for part, index in zip(model, indices, strict=True)
    ]
    kind, given = (ScheduleInterleaved1F1B, stages) if interleaved else (Schedule1F1B, stages[0])
    schedule = kind(given, MICROBATCHES, F.cross_entropy)
    ends = dist.new_group([0, ranks - 1])
    tied = [stage.embedding for stage in model if stage.embedding is not None]
    for embedding in tied:
        distclip.declare(embedding, tied_over=ends)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(0.5), stages=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    say = print if rank == 0 else lambda *_: None
    say(clipper.describe())
    say("step | loss | whole gradient | distclip | each rank alone")
    tokens = torch.arange(WORDS, device=device)
    for step in range(8):
        optimizer.zero_grad()
        losses: list[Tensor] = []
        at_end = {"target": tokens.roll(1), "losses": losses} if rank == ranks - 1 else {}
        schedule.step(*([tokens] if rank == 0 else []), **at_end)
        for embedding in tied:  # each end has found its part of the gradient
            dist.all_reduce(embedding.grad, group=ends)
        own = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        everyone: list[tuple[float, float]] = [(0.0, 0.0)] * ranks
        dist.all_gather_object(everyone, (sum(loss.item() for loss in losses) / MICROBATCHES, own.item()))
        whole = clipper.verify()  # like the lines before, for this table only
        norm = clipper.clip().total_norm
        optimizer.step()
        each = " ".join(f"{alone:.6f}" for _, alone in everyone)
        say(f"{step} | {everyone[-1][0]:.4f} | {whole:.6f} | {norm:.6f} | {each}")
    copies: list[list[Tensor]] = [[]] * ranks
    dist.all_gather_object(copies, [embedding.detach().cpu() for embedding in tied])
    say(f"copies of the embedding: {'equal' if torch.equal(*copies[0], *copies[-1]) else 'DIFFERENT'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A pipeline with a tied embedding.")
    parser.add_argument("--interleaved", action="store_true", help="two stages on each rank")
    interleaved = parser.parse_args().interleaved
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpus else "gloo")
    train("cuda" if gpus else "cpu", interleaved)
    dist.barrier()
    gc.collect()  # gloo may abort where a graph outlives its process group
    dist.destroy_process_group()
