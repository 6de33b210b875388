"""A small training script as people write them; ``sys.argv[1]`` says which, of those below."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

KIND = sys.argv[1]
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 6
MAX_NORM = 0.5
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def data(step, rank=RANK, micro=0):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randn(8, 6, generator=generator) * 3, torch.randn(8, 4, generator=generator)


def mesh(*names):
    from torch.distributed.device_mesh import init_device_mesh

    shape = (WORLD,) if len(names) == 1 else (2, WORLD // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def wrapped(model):
    if KIND.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    if KIND.startswith("fsdp2"):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=mesh("dp"))
    if KIND.startswith("hsdp"):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=mesh("replicate", "shard"))
    if KIND.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model


def main():
    if WORLD > 1:
        dist.init_process_group(
            "gloo", init_method=os.environ.get("INIT_METHOD", "env://"), rank=RANK, world_size=WORLD
        )
    model = wrapped(net(RANK if KIND == "tp" else 0))
    if KIND == "stages":  # the second half lies on the second rank, and clips by itself
        model = net()[:2] if RANK == 0 else net()[2:]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled="amp" in KIND)
    iterator = model.parameters()
    others = []
    if KIND == "amp_half_unscaled":
        two = [torch.optim.SGD(parameters[:2], lr=0.05), torch.optim.SGD(parameters[2:], lr=0.05)]
    if KIND == "muon":
        matrices = [p for p in parameters if p.dim() == 2]
        optimizer = torch.optim.Muon(matrices, lr=0.01)
        others = [torch.optim.SGD([p for p in parameters if p.dim() != 2], lr=0.05)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for other in others:
            other.zero_grad()
        x, y = data(step)
        if KIND == "before":
            clip_grad_norm_(model.parameters(), MAX_NORM)
        micros = 2 if KIND in ("ddp_no_sync", "too_early") else 1
        for micro in range(micros):
            if KIND == "ddp_no_sync":
                with model.no_sync():
                    loss_of(model, *data(step, micro=micro)).backward()
                continue
            scaler.scale(loss_of(model, x, y)).backward()
            if KIND == "too_early":
                clip_grad_norm_(model.parameters(), MAX_NORM)
        if KIND == "late_nan" and step == STEPS - 2:
            for p in parameters:
                p.grad.fill_(float("nan"))
        if KIND == "amp":
            scaler.unscale_(optimizer)
        if KIND == "amp_half_unscaled":
            scaler.unscale_(two[0])
        if KIND == "after":
            optimizer.step()
        clip(model, parameters, iterator)
        if KIND == "backward_after":
            loss_of(model, x, y).backward()
        if KIND == "after":
            continue
        if "amp" in KIND:
            for each in two if KIND == "amp_half_unscaled" else [optimizer]:
                scaler.step(each)
            scaler.update()
        else:
            optimizer.step()
        for other in others:
            other.step()
    if len(sys.argv) > 3:
        torch.save([local(p) for p in model.parameters()], f"{sys.argv[3]}.{RANK}")
    if WORLD > 1:
        dist.barrier()
        del model, optimizer
        dist.destroy_process_group()
    print("done", flush=True)
    if KIND == "exits":
        sys.exit(7)
    if KIND == "raises":
        raise RuntimeError("this script fails")


def local(p):
    p = p.detach()
    return (p.to_local() if hasattr(p, "to_local") else p).clone()


def loss_of(model, x, y):
    if KIND == "stages":
        width = 6 if RANK == 0 else 16
        return model(torch.ones(8, width) * x.mean()).square().sum()
    return (model(x) - y).square().mean() * (50.0 if KIND != "mild" else 1e-3)


def clip(model, parameters, iterator):
    if KIND in ("before", "too_early"):
        return
    if KIND == "twice":
        clip_grad_norm_(parameters + parameters[:2], MAX_NORM)
    elif KIND == "iterator":
        clip_grad_norm_(iterator, MAX_NORM)
    elif KIND == "left_out":
        clip_grad_norm_(parameters[:-2], MAX_NORM)
    elif KIND == "fsdp1_method":
        model.clip_grad_norm_(MAX_NORM)
    elif KIND == "ddp_one_rank":
        if RANK == 0:
            clip_grad_norm_(parameters, MAX_NORM)
    elif KIND == "split":
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
    elif KIND == "value":
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
    else:
        clip_grad_norm_(model.parameters(), MAX_NORM)


main()
