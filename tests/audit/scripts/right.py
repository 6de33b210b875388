"""Scripts that are right, each in a way of its own; ``sys.argv[1]`` says which."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.utils import clip_grad_norm_ as clip
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, Adam

KIND = sys.argv[1]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
X = torch.randn(16, 8) * 3
STEPS = 8


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def loss_of(model, step=0):
    return model(X + step + RANK).float().square().mean()


def two_models():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    parameters = [*a.parameters(), *b.parameters()]
    optimizer = SGD(parameters, 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(lambda x: b(a(x)), step).backward()
        clip(parameters, 0.1)
        optimizer.step()


def replaced():
    for step in range(STEPS):
        if step % 3 == 0:
            a, b = nn.Linear(8, 8), nn.Linear(8, 8)
            optimizer = SGD([*a.parameters(), *b.parameters()], 0.1)
        optimizer.zero_grad()
        loss_of(lambda x: b(a(x)), step).backward()  # noqa: B023
        clip([*a.parameters(), *b.parameters()], 0.1)
        optimizer.step()


def bf16():
    model = net().bfloat16()
    optimizer = SGD(model.parameters(), 0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(X.bfloat16() + step).float().square().mean().backward()
        clip(model.parameters(), 0.1)
        optimizer.step()


def two_optimizers():
    model = net()
    first, second = SGD(model[0].parameters(), 0.1), SGD(model[2].parameters(), 0.1)
    for step in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        loss_of(model, step).backward()
        clip(model[0].parameters(), 0.1)
        first.step()
        clip(model[2].parameters(), 0.1)
        second.step()
        get_total_norm([p.grad for p in model.parameters()])  # for the log


def autograd_grad():
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        for p, g in zip(
            model.parameters(),
            torch.autograd.grad(loss_of(model, step), list(model.parameters())),
            strict=True,
        ):
            p.grad = g
        clip(model.parameters(), 0.1)
        optimizer.step()


def skipped_steps():
    model = net()
    optimizer = SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss_of(model, step) * 1e6).backward()
        scaler.unscale_(optimizer)
        clip(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


def manual():
    model = net()
    for step in range(STEPS):
        loss_of(model, step).backward()
        clip(model.parameters(), 0.1)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad.zero_()


def lbfgs():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model)
        loss.backward()
        clip(model.parameters(), 0.1)
        return loss

    for _ in range(3):
        optimizer.step(closure)


def logged():
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(3):
            loss_of(model, step + micro).backward()
            clip(model.parameters(), float("inf"))
        clip(model.parameters(), 0.1)
        optimizer.step()


def per_layer():
    warnings.simplefilter("ignore")  # torch's own, of layers without parameters
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for layer in model:
            clip(layer.parameters(), 0.1)
        optimizer.step()


def two_scalers():
    models = [net(), net()]
    optimizers = [Adam(m.parameters(), 1e-3) for m in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in models]
    for step in range(STEPS):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            scaler.unscale_(optimizer)
            clip(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()


def scaler_of_before():
    model = net()
    optimizer = SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step < 3:
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
        else:
            loss_of(model, step).backward()
        clip(model.parameters(), 0.1)
        if step < 3:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


def compiled():
    model = net()
    optimizer = SGD(model.parameters(), 0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def inside(parameters):
        return clip(parameters, 0.1)

    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        inside(list(model.parameters()))
        clip(model.parameters(), 0.05)
        optimizer.step()


def norm_zero():
    """The count of what is not zero: a "norm" that distclip has not."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        clip(model.parameters(), float("inf"), norm_type=0)
        clip(model.parameters(), 0.1)
        optimizer.step()


def goes_elsewhere():
    """And starts a process that ends by itself."""
    os.chdir("/")
    two_models()
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        sys.exit(0)


def joined():
    """Ranks with other numbers of batches."""
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = SGD(model.parameters(), 0.1)
    with Join([model]):
        for step in range(STEPS + 2 * RANK):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            clip(model.parameters(), 0.1)
            optimizer.step()


def averaged_on_one_rank():
    model = net()

    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

    keep = Average() if RANK == 0 else None
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = SGD(parallel.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(parallel, step).backward()
        clip(parallel.parameters(), 0.1)
        optimizer.step()
    del keep


def by_hand():
    """Stages that take the norm together."""
    torch.manual_seed(RANK)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norm = get_total_norm([p.grad for p in model.parameters()])
        total = norm**2
        dist.all_reduce(total)
        clip_grads_with_norm_(model.parameters(), 0.1, total.sqrt())
        optimizer.step()


def branches():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if RANK == 0:
            print(clip(model.parameters(), 0.1).full_tensor(), file=sys.stderr)
        else:
            clip(model.parameters(), 0.1).full_tensor()
        optimizer.step()


def without_a_group():
    two_models()


if WORLD > 1 and KIND != "without_a_group":
    dist.init_process_group("gloo")
globals()[KIND]()
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
print("done")
