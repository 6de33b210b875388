"""54 and law 13: ranks that pass other lists get one error, on all, that names the first difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import AGC, AdaGC, GlobalNorm, PerGroup, PerParameter, Strategy
from tests.harness import on_ranks
from tests.layouts import mesh1, mesh2


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": mlp,
    "DDP": lambda: DDP(mlp()),
    "FSDP2": lambda: fully_shard(mlp(), mesh=mesh1(2)),  # type: ignore[arg-type]
    "TP": lambda: parallelize_module(mlp(), mesh1(2, "tp"), {"0": ColwiseParallel(), "1": RowwiseParallel()}),
}
Named = list[tuple[str, Tensor]]
PER_PARAMETER: dict[str, Callable[[], Strategy]] = {
    "PerParameter": lambda: PerParameter(1.0),
    "AdaGC": AdaGC,
    "PerGroup": lambda: PerGroup({"*0*": 1.0, "*": 2.0}),
    "AGC": AGC,
}


def planted(m: nn.Module, name: str = "") -> Named:
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    return [(n.removeprefix("module."), p) for n, p in m.named_parameters()]


def swapped(named: Named) -> Named:
    """Two of one shape."""
    return [named[2], named[1], named[0], *named[3:]]


def without_gradients(named: Named) -> Named:
    """A list as made of those that have a gradient, where rank 1 lacks one."""
    named[1][1].grad = None
    return [(n, p) for n, p in named if p.grad is not None]


def frozen(named: Named) -> Named:
    named[1][1].requires_grad_(False)
    named[1][1].grad = None
    return named


def of_another_shape(named: Named) -> Named:
    return [(n, nn.Parameter(torch.ones(3))) if i == 1 else (n, p) for i, (n, p) in enumerate(named)]


def of_another_dtype(named: Named) -> Named:
    return [(n, nn.Parameter(p.detach().double())) if i == 1 else (n, p) for i, (n, p) in enumerate(named)]


# What rank 1 passes, and what the error says: the number of the first difference, or what differs.
OTHERS: dict[str, tuple[Callable[[Named], Named], str]] = {
    "two swapped": (
        swapped,
        r"Number 0 is '[01].weight' of shape \(4, 4\) \(float32[^)]*\) on some ranks, and '[01].weight'",
    ),
    "turned round": (lambda named: named[::-1], r"Number 0 is "),
    "filtered": (without_gradients, r"5 on some, 6 on others.*Number 1 is .*0.bias"),
    "the last one less": (lambda named: named[:-1], r"Number 5 is '2.bias' of shape \(6,\).*missing"),
    "one more": (lambda named: [*named, ("more", nn.Parameter(torch.ones(2)))], r"Number 6 is 'more'"),
    "frozen": (frozen, r"Number 1 is .*'0.bias'"),
    "another shape": (of_another_shape, r"Number 1 is '0.bias' of shape .*\(3,\)"),
    "another name": (
        lambda named: [("other", p) if n == "1.bias" else (n, p) for n, p in named],
        r"Number 3 is '(other|1.bias)'",
    ),
    "another prefix": (lambda named: [("net." + n, p) for n, p in named], r"Number 0 is '(net\.)?0.weight'"),
    "only what is called alike": (lambda named: named[:2], r"2 on some, 6 on others.*Number 2 is '1.weight'"),
}


def local(gradient: Any) -> Tensor:
    """To compare DTensors is a collective."""
    return getattr(gradient, "_local_tensor", gradient)


def refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(distclip.OwnershipError, match=f"(?s){says}"):
        call()


@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_named_lists(rank: int, model: str) -> None:
    for change, says in OTHERS.values():
        named = planted(MODELS[model]())
        if rank:
            named = change(named)
        before = [p.grad.clone() if p.grad is not None else None for _, p in named]
        clipper = distclip.Clipper(named, GlobalNorm(1.0))
        refused(clipper.clip, says)
        refused(lambda c=clipper: c.plan, says)  # type: ignore[misc]
        refused(lambda n=named: distclip.clip_grad_norm_(n, 1.0), says)  # type: ignore[misc]
        for (_, p), b in zip(named, before, strict=True):
            assert (p.grad is None) == (b is None)
            assert b is None or torch.equal(local(p.grad), local(b))


@pytest.mark.parametrize("strategy", PER_PARAMETER)
@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_bare_lists_in_another_order(rank: int, model: str, strategy: str) -> None:
    """Nothing but the module tells one ``parameters[0]`` from another of its shape."""
    m = MODELS[model]()
    planted(m)
    tensors = list(m.parameters())
    if rank:
        tensors[0], tensors[2] = tensors[2], tensors[0]
    make = PER_PARAMETER[strategy] if strategy != "PerGroup" else lambda: PerGroup({"*[[]0]": 1.0, "*": 2.0})
    refused(
        distclip.Clipper(tensors, make()).clip,
        r"Number 0 is 'parameters\[0\]' of shape \(4, 4\).* \([01].weight\)",
    )


@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_bare_lists(rank: int, model: str) -> None:
    for change, says in (
        (lambda ps: ps[:-1], r"Number 5 is 'parameters\[5\]'"),
        (lambda ps: ps[::-1], r"Number 0 is "),
        (lambda ps: [p for i, p in enumerate(ps) if i != 1], r"Number 1 is 'parameters\[1\]'"),
    ):
        m = MODELS[model]()
        planted(m)
        tensors = list(m.parameters())
        given = change(tensors) if rank else tensors
        refused(distclip.Clipper(given, GlobalNorm(1.0)).clip, says)
        refused(lambda g=given: distclip.clip_grad_norm_(iter(g), 1.0), says)  # type: ignore[misc]
        refused(lambda g=given: distclip.total_grad_norm(tuple(g)), says)  # type: ignore[misc]
        optimizer = torch.optim.SGD(given, lr=0.1)
        refused(
            distclip.Clipper(optimizer, GlobalNorm(1.0)).clip,
            says.replace("parameters", r"param_groups\[0\]"),
        )


@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_in_another_order_where_order_says_nothing(rank: int, model: str) -> None:
    """One norm of all, and a bare list: the order is nobody's business, and the norm is right."""
    m = MODELS[model]()
    named = planted(m)
    tensors = [p for _, p in named]
    if rank and model == "FSDP2":  # plain copies are compared one by one
        tensors[0], tensors[2] = tensors[2], tensors[0]
    want = sum(p.numel() for _, p in named) ** 0.5
    assert distclip.Clipper(tensors, GlobalNorm(1.0)).clip().total_norm.item() == pytest.approx(want)


@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_param_norms_need_the_order(rank: int, model: str) -> None:
    m = MODELS[model]()
    planted(m)
    tensors = list(m.parameters())
    if rank:
        tensors[0], tensors[2] = tensors[2], tensors[0]
    clipper = distclip.Clipper(tensors, GlobalNorm(1.0))
    refused(lambda: clipper.clip(param_norms=True), r"Number 0 is 'parameters\[0\]'")


@pytest.mark.parametrize("model", MODELS)
@on_ranks(2)
def test_54_what_may_differ(rank: int, model: str) -> None:
    """A list, a tuple, a generator; a missing gradient."""
    m = MODELS[model]()
    named = planted(m)
    want = sum(p.numel() for _, p in named) ** 0.5
    for source in (
        [list, tuple][rank](named),
        [iter, list][rank](named),
        m if rank else list(m.named_parameters()),
    ):
        assert distclip.Clipper(source, PerParameter(1.0)).clip().total_norm.item() == pytest.approx(want)
        planted(m)
    named[1][1].grad = None
    if model in ("plain", "DDP"):
        distclip.Clipper(named, GlobalNorm(1.0)).clip()


@pytest.mark.parametrize("model", ["plain", "FSDP2"])
@on_ranks(2)
def test_54_another_dtype(rank: int, model: str) -> None:
    named = planted(MODELS[model]())
    if rank:
        named = of_another_dtype(named)
        named[1][1].grad = torch.ones_like(named[1][1])
    if model == "FSDP2" and rank:
        named[1][1].grad = None
    refused(distclip.Clipper(named, GlobalNorm(1.0)).clip, "0.bias|Number 1")


@on_ranks(4)
def test_54_hybrid_shards(rank: int) -> None:
    for change, says in OTHERS.values():
        named = planted(fully_shard(mlp(), mesh=mesh2(2, 2, "replicate", "shard")))  # type: ignore[arg-type]
        if rank == 3:
            named = change(named)
        refused(distclip.Clipper(named, GlobalNorm(1.0)).clip, says)


@on_ranks(2)
def test_54_a_step_that_finds_a_list_changed(rank: int) -> None:
    """The program's own list, shortened on one rank later."""
    named = planted(MODELS["FSDP2"]())
    clipper = distclip.Clipper(named, GlobalNorm(1.0))
    for _ in range(2):
        clipper.clip()
    if rank:
        del named[-1]
    refused(clipper.clip, "have changed")


@pytest.mark.parametrize("odd", [0, 1])
@on_ranks(2)
def test_54_cut_on_one_rank_only(rank: int, odd: int) -> str:
    """What comes after the lists asks along the axes of each parameter: this was a crash in the backend."""
    mesh, plain = mesh1(2), nn.Parameter(torch.ones(4, 4))
    cut = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    whole = nn.Parameter(torch.ones(8, 4))
    named = [("a", plain), ("b", whole if rank == odd else cut)]
    with pytest.raises(distclip.OwnershipError, match=r"Number 1 is 'b'.*cut along 1 axis"):
        distclip.Clipper(named, distclip.GlobalNorm(1.0)).clip()
    return ""
