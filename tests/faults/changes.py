"""What programs do to their parameters and gradients between two clips, drawn at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

import distclip
from tests.faults.worlds import World, like, local_of


@dataclass
class Change:
    """Something between two steps.

    Attributes:
        run: on the ranks that change; what it draws is drawn alike by all.
        fits: whether it can be done there (asked with facts that all ranks share).
        some: whether a program may do it on some ranks only.
    """

    run: Callable[[World, random.Random, Any], None]
    fits: Callable[[World, Any], bool] = lambda world, optimizer: True
    some: bool = True


CHANGES: dict[str, Change] = {}


def change(words: str, **kwargs: Any) -> Callable[[Any], Any]:
    def register(run: Any) -> Any:
        CHANGES[words] = Change(run, **kwargs)
        return run

    return register


def _has_modules(world: World, optimizer: Any) -> bool:
    """FSDP1 has its own ideas of what is in it."""
    return world.flat is None


def _is_plain(world: World, optimizer: Any) -> bool:
    return world.kind in ("replicas", "4 stages", "experts", "2 stages, plain")


def _has_optimizer(world: World, optimizer: Any) -> bool:
    return optimizer is not None


def _net(world: World, rng: random.Random) -> Any:
    nets = world.nets()
    return nets[rng.randrange(len(nets))]


def _linear(rng: random.Random, *shape: int) -> nn.Linear:
    torch.manual_seed(rng.randrange(1 << 30))
    return nn.Linear(*shape)


def _width(net: Any) -> int:
    return int(net.gain.shape[0]) if not hasattr(net, "norm") else int(net.norm.normalized_shape[0])


@change("the head replaced", fits=_has_modules)
def head(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.head = _linear(rng, _width(net), rng.choice([3, 3, 5]))


@change("the head replaced by a sharded one", fits=lambda w, _: w.mesh is not None, some=False)
def sharded_head(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.head = fully_shard(_linear(rng, _width(net), 3), mesh=world.mesh)


@change("a parameter registered", fits=_has_modules)
def registered(world: World, rng: random.Random, _: Any) -> None:
    net, number = _net(world, rng), rng.randrange(1 << 20)
    net.register_parameter(f"late{number}", nn.Parameter(torch.ones(rng.choice([1, 3]))))


@change("an adapter added", fits=_has_modules)
def adapter(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    n = _width(net)
    net.body[rng.randrange(len(net.body))].adapter = nn.Sequential(_linear(rng, n, 1), _linear(rng, 1, n))


@change("all frozen, an adapter added", fits=_has_modules)
def lora(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.requires_grad_(False)
    net.norm.adapter = _linear(rng, 2, 2)


@change("a layer frozen")
def frozen(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    (net.first if rng.random() < 0.5 else net.norm).requires_grad_(False)


@change("everything unfrozen")
def unfrozen(world: World, rng: random.Random, _: Any) -> None:
    for net in world.nets():
        net.requires_grad_(True)


@change("load_state_dict(assign=True)", fits=_has_modules)
def assigned(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.load_state_dict({k: v.detach().clone() for k, v in net.state_dict().items()}, assign=True)


@change("to meta and to_empty", fits=_is_plain)
def to_empty(world: World, rng: random.Random, _: Any) -> None:
    (model,) = world.models
    model.to("meta")
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)


@change("a parametrization", fits=_is_plain)
def parametrized(world: World, rng: random.Random, _: Any) -> None:
    layer = _net(world, rng).first
    if not hasattr(layer, "parametrizations"):
        parametrizations.weight_norm(layer)


@change("bfloat16", fits=_has_modules)
def bfloat16(world: World, rng: random.Random, _: Any) -> None:
    for net in world.nets():
        net.bfloat16()


@change("float64", fits=_has_modules)
def double(world: World, rng: random.Random, _: Any) -> None:
    for net in world.nets():
        net.double()


@change("a layer taken out", fits=_has_modules)
def taken_out(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    if len(net.body) > 1:
        net.body.pop(rng.choice([0, -1]))


@change("layers in another order", fits=_has_modules)
def another_order(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.body = nn.ModuleList(list(net.body)[::-1])


@change("weights tied", fits=_is_plain)
def tied(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.body[-1].weight = net.body[0].weight


def _is_not_fsdp(world: World, optimizer: Any) -> bool:
    """FSDP2 does not expect that a parameter of its own is another, and raises in ``_apply``."""
    sharded = "sharded" in world.kind or any(isinstance(m, FSDPModule) for m in world.models)
    return world.flat is None and not sharded


@change("a plain parameter where a cut one was", fits=_is_not_fsdp)
def plain_for_cut(world: World, rng: random.Random, _: Any) -> None:
    net = _net(world, rng)
    net.body[0].bias = nn.Parameter(torch.ones(_width(net)))


@change("a layer sharded afterwards", fits=lambda w, _: w.kind == "replicas" or w.kind == "TP", some=False)
def sharded_afterwards(world: World, rng: random.Random, _: Any) -> None:
    from tests.layouts import mesh1

    head = _net(world, rng).head
    if not isinstance(next(head.parameters()), DTensor):
        fully_shard(head, mesh=mesh1(4, "tp" if world.kind == "TP" else "dp"))


@change("declared: other elements on every rank", fits=lambda w, _: w.kind in ("replicas", "experts", "TP"))
def declared(world: World, rng: random.Random, _: Any) -> None:
    net, whole = _net(world, rng), rng.random() < 0.7
    item = net.norm if whole else net.gain
    distclip.declare(item, sharded_over=dist.group.WORLD)
    world.said.append(item)
    world.own = [(i, c) for i, c in world.own if i is not item]
    world.own.append((item, dist.get_rank()))


@change("declared: an ordinary replica", fits=lambda w, _: w.kind in ("replicas", "TP", "DDP"))
def declared_replica(world: World, rng: random.Random, _: Any) -> None:
    head = _net(world, rng).head
    distclip.declare(head, sharded_over=())
    world.said.append(head)


@change("an expert's weight replaced", fits=lambda w, _: w.kind == "experts")
def expert(world: World, rng: random.Random, _: Any) -> None:
    (model,) = world.models
    layer: Any = model.expert
    layer.weight = nn.Parameter(torch.randn(4, 4))


@change("the optimizer's list in another order", fits=_has_optimizer)
def swapped(world: World, rng: random.Random, optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"] = group["params"][::-1]


@change("the optimizer's list of what the models hold now", fits=_has_optimizer)
def renewed(world: World, rng: random.Random, optimizer: Any) -> None:
    optimizer.param_groups[:] = optimizer.param_groups[:1]
    optimizer.param_groups[0]["params"] = [p for _, p in world.named()]


@change("a parameter of the optimizer replaced in its list", fits=_has_optimizer)
def replaced_in_list(world: World, rng: random.Random, optimizer: Any) -> None:
    held = optimizer.param_groups[0]["params"]
    if world.flat is None and not isinstance(held[-1], DTensor):
        held[-1] = nn.Parameter(held[-1].detach().clone())


@change("a group added to the optimizer", fits=_has_optimizer)
def group_added(world: World, rng: random.Random, optimizer: Any) -> None:
    new = nn.Parameter(torch.ones(rng.choice([2, 5])))
    world.keep.append(new)
    optimizer.add_param_group({"params": [new]})


@change("a new process group", some=False)
def new_group(world: World, rng: random.Random, _: Any) -> None:
    world.keep.append(dist.new_group([0, 1, 2, 3] if rng.random() < 0.5 else [1, 2]))


@change("collected garbage")
def collected(world: World, rng: random.Random, _: Any) -> None:
    import gc

    gc.collect()


@change("the models copied")
def copied(world: World, rng: random.Random, _: Any) -> None:
    (net, *_) = world.nets()
    if world.kind in ("replicas", "experts") and not any(isinstance(m, FSDPModule) for m in net.modules()):
        world.keep.append(copy.deepcopy(net))


# --- gradients, of one step -----------------------------------------------------------------------------


@dataclass
class Spoilt:
    """Done to the gradients of one step.

    Attributes:
        run: on the pieces chosen; gets this rank's tensors that have a gradient, by name.
        everywhere: on all pieces alike; else on those of one coordinate (so that copies stay copies).
    """

    run: Callable[[World, random.Random, dict[str, Tensor]], None]
    everywhere: bool = False
    plain_only: bool = False
    keeps_finite: bool = True
    kinds: tuple[str, ...] = field(default=())


SPOILT: dict[str, Spoilt] = {}


def spoilt(words: str, **kwargs: Any) -> Callable[[Any], Any]:
    def register(run: Any) -> Any:
        SPOILT[words] = Spoilt(run, **kwargs)
        return run

    return register


def some_of(named: dict[str, Tensor], rng: random.Random) -> list[Tensor]:
    """By name, the same on every rank that has these names."""
    share = rng.choice([0.2, 0.6, 1.0])
    salt = rng.randrange(1 << 30)
    return [p for name, p in named.items() if random.Random(f"{salt} {name}").random() < share]


@spoilt("gradients missing")
def missing(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        p.grad = None


@spoilt("no gradients at all", everywhere=True)
def none(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in named.values():
        p.grad = None


@spoilt("gradients of 0")
def zero(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        local_of(p.grad).zero_()


@spoilt("NaN", keeps_finite=False)
def nan(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    _put(named, rng, torch.nan)


@spoilt("an infinity", keeps_finite=False)
def infinite(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    _put(named, rng, -torch.inf)


def _put(named: dict[str, Tensor], rng: random.Random, value: float) -> None:
    for p in some_of(named, rng)[-1:]:
        local = local_of(p.grad)
        if local.numel():
            local.view(-1)[-1] = value


@spoilt("sparse gradients", everywhere=True, plain_only=True)
def sparse(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        if p.dim() == 2 and not isinstance(p, DTensor):
            rows = torch.tensor([0, p.shape[0] - 1, 0])
            p.grad = torch.sparse_coo_tensor(rows[None], p.grad[rows], p.shape)


@spoilt("expanded gradients", everywhere=True)
def expanded(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        local = local_of(p.grad)
        if p.dim() and local.numel():
            p.grad = like(p, torch.ones((), dtype=p.dtype).expand(local.shape))


@spoilt("gradients of 1e25", everywhere=True)
def huge(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        local_of(p.grad).mul_(1e25)


@spoilt("transposed gradients", everywhere=True)
def transposed(world: World, rng: random.Random, named: dict[str, Tensor]) -> None:
    for p in some_of(named, rng):
        local = local_of(p.grad)
        if p.dim() == 2:
            p.grad = like(p, local.t().contiguous().t())
