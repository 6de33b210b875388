"""Mixed precision, loss scaling and gradient accumulation in one step; stops and resumes.

    python examples/amp_accumulation.py                                                # bfloat16
    torchrun --standalone --nproc-per-node 2 examples/amp_accumulation.py --dtype float16 --parallel fsdp2
    python examples/amp_accumulation.py --stop-after 90 --checkpoint run.pt            # interrupted ...
    python examples/amp_accumulation.py --checkpoint run.pt                            # ... and continued

``clipper.step`` takes the place of ``scaler.unscale_``, the clip, ``scaler.step`` and ``scaler.update``; the
checkpoint has the threshold's history. On CPUs, or with one GPU per rank.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip

WIDTH, BATCH, MICRO_BATCHES, LAST = 64, 32, 4, 200  # LAST is a number of micro-batches


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(device)
    teacher = torch.randn(WIDTH, WIDTH, device=device)
    model = fully_shard(model) if args.parallel == "fsdp2" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    dtype = getattr(torch, args.dtype)
    # Too high a scale on purpose: float16 overflows, and all ranks skip until it has come down.
    scaler = GradScaler(device.type, init_scale=2.0**28, enabled=dtype == torch.float16)
    strategy = distclip.Percentile(percentile=10, multiplier=1, history=20, warmup=5)
    clipper = distclip.Clipper(model, strategy, apply="deferred")

    first, path = 0, args.checkpoint and f"{args.checkpoint}.{rank}"
    if path and os.path.exists(path):
        saved = torch.load(path, map_location=device, weights_only=False)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        clipper.load_state_dict(saved["clipper"])
        first = saved["micro_batch"]
        say(f"resumed after: {first} micro-batches, {clipper.steps} steps")
    end = min(args.stop_after, LAST)
    for i in range(first, end):
        data = torch.Generator().manual_seed(i)  # the batch of all ranks, of which this one takes its share
        x = torch.randn(BATCH, WIDTH, generator=data)[rank::world].to(device)
        with clipper.accumulate(MICRO_BATCHES, last=i == LAST - 1) as micro:
            with torch.autocast(device.type, dtype):
                out = model(x)
            micro.backward((out.float() - torch.sin(x @ teacher / 4)).square().mean(), scaler)
        if micro.complete:
            report = clipper.step(optimizer, scaler)
            optimizer.zero_grad()
            if clipper.steps % 10 == 0 or clipper.steps < 4:
                scale = f", scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
                say(f"step {clipper.steps}: {report}{scale}")
    if path:  # in the middle of a window too: its last micro-batches are then a step of their own
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "scaler": scaler.state_dict(), "micro_batch": end}
        torch.save({**state, "clipper": clipper.state_dict()}, path)
    total = sum(p.detach().square().sum() for p in model.parameters())
    whole = total.full_tensor() if args.parallel == "fsdp2" else total
    say(f"steps: {clipper.steps}")
    say(f"weights: {whole.item():.6g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mixed precision with gradient accumulation.")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--checkpoint", help="file to resume from, if it is there, and to write at the end")
    parser.add_argument("--stop-after", type=int, default=LAST, help="micro-batches")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(here)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if gpus else "gloo", **alone)
    train(arguments, here)
    dist.barrier()
    gc.collect()  # gloo aborts at exit where an FSDP2 model outlives its process group
    dist.destroy_process_group()
