"""A training run in which one rank fails: what tests/launch/test_faults.py starts under torchrun.

    torchrun … faulty.py DIRECTORY FAULT TIMEOUT

FSDP2, AdamW and two adaptive strategies; a checkpoint every third step, from which a restarted run goes on.
In its first life, in the middle of step 8, rank 1 does what FAULT says, and then not again. TIMEOUT is that
of the process group, in seconds.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2's first pass would, for longer than the shortest timeout where cores are scarce
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip

STEPS, EVERY, AT = 12, 3, 8


def fail(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raises":
        raise ValueError("the data of rank 1 are broken")
    if fault == "late":
        time.sleep(60)


def train(directory: Path, fault: str) -> None:
    rank, first_life = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    strategy = distclip.Chain(distclip.AdaGC(warmup=3), distclip.ZClip(warmup=3))
    clipper = distclip.Clipper(model, strategy)
    history = distclip.History(directory / "run.jsonl", strategy=strategy, block=1, param_norms_every=1)

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        ours = {"clipper": clipper.state_dict(), "history": history.state_dict()}
        return {"model": of_model, "optimizer": of_optimizer, **ours}

    done, latest = 0, directory / "latest"
    if latest.exists():
        loaded = state()
        dcp.load(loaded, checkpoint_id=directory / latest.read_text())
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        clipper.load_state_dict(loaded["clipper"])
        history.load_state_dict(loaded["history"])
        done = clipper.steps
    for step in range(done + 1, STEPS + 1):
        draw = torch.Generator().manual_seed(100 * step + rank)
        spike = 30.0 if step in (5, 7, 10) else 1.0
        optimizer.zero_grad()
        (spike * model(torch.randn(4, 8, generator=draw)).square().mean()).backward()
        if rank == 1 and step == AT and first_life:
            fail(fault)
        history.record(clipper.step(optimizer, param_norms=True))
        if step % EVERY == 0:
            dcp.save(state(), checkpoint_id=directory / f"step-{step}")
            dist.barrier()  # written on every rank
            if rank == 0:
                latest.with_suffix(".new").write_text(f"step-{step}")
                latest.with_suffix(".new").replace(latest)
            dist.barrier()  # and known to be: a restart finds the same on every rank
    history.close()
    weights = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    if rank == 0:
        end = {"weights": weights, "steps": clipper.steps, "strategy": clipper.state_dict()["strategy"]}
        (directory / "end.json").write_text(json.dumps(end, default=lambda tensor: tensor.tolist()))


if __name__ == "__main__":
    directory, fault, timeout = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(timeout)))
    train(Path(directory), fault)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
