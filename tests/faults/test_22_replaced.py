"""22: what a program does to its parameters after the first clip is found at the next one."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, parametrize, prune

import distclip
from tests.faults.ways import ALL, BOUND, WITHOUT_OVERLAP, assert_right, clipping, fill, raised
from tests.harness import on_ranks
from tests.layouts import mesh1, mesh2


class Net(nn.Module):
    """Something of everything that a module can hold parameters in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.towers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(2)])
        self.table = nn.ParameterDict({"x": nn.Parameter(torch.ones(2)), "y": nn.Parameter(torch.ones(2))})
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight  # tied
        self.extra: nn.Module | None = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(()))


CHANGES: dict[str, Callable[[Any], Any]] = {}


def change(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CHANGES[make.__name__] = make
    return make


def new(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def _lines(changes: dict[str, Callable[[Any], Any]]) -> None:
    CHANGES.update(changes)


_lines(
    {
        "head": lambda m: setattr(m, "head", nn.Linear(4, 9)),
        "head of the same shape": lambda m: setattr(m, "head", nn.Linear(4, 6)),
        "inside a Sequential": lambda m: m.body.__setitem__(0, nn.Linear(4, 5)),
        "a parameter for another": lambda m: setattr(m.body[0], "weight", new(4, 4)),
        "_parameters[...] =": lambda m: m.body[0]._parameters.__setitem__("weight", new(4, 4)),
        "registered": lambda m: m.register_parameter("late", new(3)),
        "registered in one that had none": lambda m: m.blocks.register_parameter("late", new(3)),
        "deleted": lambda m: delattr(m.body[0], "bias"),
        "set to None": lambda m: setattr(m.body[0], "bias", None),
        "a module set to None": lambda m: setattr(m, "extra", None),
        "a module deleted": lambda m: delattr(m, "extra"),
        "None to a parameter": lambda m: (setattr(m.extra, "bias", None), setattr(m.extra, "bias", new(2))),
        "ModuleList.append": lambda m: m.blocks.append(nn.Linear(4, 4)),
        "ModuleList.insert": lambda m: m.blocks.insert(0, nn.Linear(4, 4)),
        "ModuleList.pop": lambda m: m.blocks.pop(1),
        "ModuleList[1:]": lambda m: setattr(m, "blocks", m.blocks[1:]),
        "ModuleDict.pop": lambda m: m.towers.pop("a"),
        "ModuleDict.update": lambda m: m.towers.update({"c": nn.Linear(4, 4)}),
        "ModuleDict swapped": lambda m: m.towers.update({"a": m.towers["b"], "b": m.towers["a"]}),
        "ParameterList.append": lambda m: m.scales.append(new(3)),
        "ParameterList[0] =": lambda m: m.scales.__setitem__(0, new(3)),
        "ParameterDict[new] =": lambda m: m.table.__setitem__("z", new(2)),
        "ParameterDict.pop": lambda m: m.table.pop("x"),
        "untied": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
        "tied": lambda m: setattr(m.towers["a"], "weight", m.towers["b"].weight),
        "a module shared": lambda m: setattr(m, "extra", m.towers["a"]),
        "load_state_dict(assign=True)": lambda m: m.load_state_dict(
            copy.deepcopy(m.state_dict()), assign=True
        ),
        "to meta and to_empty": lambda m: (
            m.to("meta"),
            m.to_empty(device="cpu"),
            [p.data.fill_(1.0) for p in m.parameters()],
        ),
        "weight_norm": lambda m: parametrizations.weight_norm(m.body[0]),
        "spectral_norm": lambda m: parametrizations.spectral_norm(m.towers["a"]),
        "a parametrization and off again": lambda m: (
            parametrizations.orthogonal(m.body[0]),
            parametrize.remove_parametrizations(m.body[0], "weight"),
        ),
        "pruned": lambda m: prune.l1_unstructured(m.body[0], "weight", amount=2),
        ".data of another shape": lambda m: setattr(m.scales[0], "data", torch.ones(7)),
        "frozen": lambda m: m.body.requires_grad_(False),
        "frozen but for one": lambda m: (m.requires_grad_(False), m.gain.requires_grad_(True)),
        "double()": lambda m: m.double(),
        "bfloat16()": lambda m: m.bfloat16(),
        "half of it bfloat16": lambda m: m.towers.bfloat16(),
        "checkpointed": lambda m: apply_activation_checkpointing(
            m, check_fn=lambda c: isinstance(c, nn.Linear)
        ),
        "compiled in place": lambda m: m.body.compile(backend="eager"),
        "a compiled child": lambda m: setattr(m, "body", torch.compile(m.body, backend="eager")),
        "__dict__ of another": lambda m: m.body[0].__dict__.update(nn.Linear(4, 4).__dict__),
        "__dict__ of another, the whole": lambda m: m.__dict__.update(Net().__dict__),
        "_parameters replaced": lambda m: setattr(m.body[0], "_parameters", {"weight": new(4, 4)}),
        "_modules replaced": lambda m: setattr(m.body, "_modules", {"0": nn.Linear(4, 4)}),
        "children in another order": lambda m: m._modules.update({"embed": m._modules.pop("embed")}),
        "__setstate__": lambda m: m.body[0].__setstate__(copy.deepcopy(m.body[0]).__dict__),
        "swap_tensors": lambda m: torch.utils.swap_tensors(m.body[0].weight, new(5, 4)),
        "DDP-like wrapper inside": lambda m: setattr(m, "towers", nn.Sequential(m.towers)),
        "lazy": lambda m: (setattr(m, "extra", nn.LazyLinear(3)), m.extra(torch.ones(1, 4))),
    }
)


@change
def lora(m: Any) -> None:
    m.requires_grad_(False)
    for block in m.blocks:
        block.down, block.up = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)


@change
def moved_with_swap(m: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@change
def loaded_with_swap(m: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.load_state_dict(copy.deepcopy(m.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("kind", CHANGES)
def test_22_replaced(kind: str, way: str) -> None:
    model = Net()
    with clipping(way, model) as clip:
        for step in range(2):
            fill(model, seed=step)
            assert_right(clip, model)
        model.zero_grad()
        CHANGES[kind](model)
        for step in range(2):
            fill(model, 3.0, seed=step)
            assert_right(clip, model)
        if way != "accelerate":
            fill(model, 3.0)
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[-1] = torch.nan
            assert not clip().isfinite()  # what is new is measured, to its last element


# --- on several ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["clip", "step, overlap", "list", "accelerate"])
@pytest.mark.parametrize("kinds", [list(CHANGES)[i::6] for i in range(6)], ids=lambda kinds: kinds[0])
@on_ranks(2)
def test_22_replaced_in_replicas(rank: int, kinds: list[str], way: str) -> None:
    for kind in kinds:
        model = Net()
        with clipping(way, model) as clip:
            for step in range(2):
                fill(model, seed=step)
                assert_right(clip, model)
            CHANGES[kind](model)
            for step in range(3):
                fill(model, 3.0, seed=step)
                assert_right(clip, model)


def planted(model: nn.Module, seed: int) -> None:
    """The same whole gradients on every rank, laid as the parameters are."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if p.requires_grad else None
        else:
            p.grad = whole if p.requires_grad else None


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))


def sharded(**kwargs: Any) -> nn.Sequential:
    model = mlp()
    for layer in model:
        fully_shard(layer, mesh=mesh1(2), **kwargs)
    return fully_shard(model, mesh=mesh1(2))


def tensor_parallel() -> nn.Sequential:
    return parallelize_module(mlp(), mesh1(2, "tp"), {"0": ColwiseParallel(), "1": RowwiseParallel()})


def sharded_head(m: nn.Sequential) -> None:
    m[2] = fully_shard(nn.Linear(8, 5), mesh=mesh1(2))


def plain_beside(m: nn.Sequential) -> None:
    m.append(nn.Linear(4, 4))


def assigned(m: nn.Sequential) -> None:
    m.load_state_dict({k: v.detach().clone() for k, v in m.state_dict().items()}, assign=True)


def swapped(p: DTensor, placement: Any) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().redistribute(placements=[placement])))


LAYOUTS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[Any], Any]]] = {
    "FSDP2: a sharded head": (sharded, sharded_head),
    "FSDP2: a plain layer beside": (sharded, plain_beside),
    "FSDP2: a plain parameter in the place of a sharded one": (
        sharded,
        lambda m: setattr(m[1], "bias", new(8)),
    ),
    "FSDP2: a layer less": (sharded, lambda m: m.pop(2)),
    "FSDP2: frozen": (sharded, lambda m: m[0].requires_grad_(False)),
    "FSDP2: all frozen but for a plain adapter": (
        sharded,
        lambda m: (m.requires_grad_(False), plain_beside(m)),
    ),
    "FSDP2: load_state_dict(assign=True)": (sharded, assigned),
    "FSDP2 applied afterwards": (mlp, lambda m: [fully_shard(layer, mesh=mesh1(2)) for layer in m]),
    "FSDP2 applied to one layer afterwards": (mlp, lambda m: fully_shard(m[1], mesh=mesh1(2))),
    "TP applied afterwards": (
        mlp,
        lambda m: parallelize_module(m, mesh1(2, "tp"), {"0": ColwiseParallel(), "1": RowwiseParallel()}),
    ),
    "TP: double()": (tensor_parallel, lambda m: m.double()),
    "TP: bfloat16()": (tensor_parallel, lambda m: m.bfloat16()),
    "TP: load_state_dict(assign=True)": (tensor_parallel, assigned),
    "TP: a plain layer beside": (tensor_parallel, plain_beside),
    "TP: sharded layers replaced by plain ones": (
        tensor_parallel,
        lambda m: (m.__setitem__(0, nn.Linear(4, 8)), m.__setitem__(1, nn.Linear(8, 8))),
    ),
    "TP: another layer split": (
        tensor_parallel,
        lambda m: parallelize_module(m[2], mesh1(2, "tp"), ColwiseParallel()),
    ),
    # (torch swaps a DTensor only with another one.)
    "TP: a DTensor swapped for one of another placement": (
        tensor_parallel,
        lambda m: swapped(m[0].weight, Shard(1)),
    ),
    "TP: all DTensors swapped for replicated ones": (
        tensor_parallel,
        lambda m: [swapped(p, Replicate()) for p in m.parameters() if isinstance(p, DTensor)],
    ),
}


@pytest.mark.parametrize("way", ["clip", "step", "step, overlap", "function", "list", "accelerate"])
@pytest.mark.parametrize("kind", LAYOUTS)
@on_ranks(2)
def test_22_layouts_that_change(rank: int, kind: str, way: str) -> None:
    build, changed = LAYOUTS[kind]
    model = build()
    with clipping(way, model) as clip:
        for step in range(2):
            planted(model, step)
            assert_right(clip, model)
        model.zero_grad()
        changed(model)
        for step in range(3):
            planted(model, step + 9)
            assert_right(clip, model)


# (Of a list that a function is called with nothing tells that it was another one: there the rank that changed
# waits for the others, see test_waiting. And what is merely frozen on a rank has no gradient there.)
@pytest.mark.parametrize("way", ["clip", "step", "function", "accelerate"])
@pytest.mark.parametrize("kind", [k for k in LAYOUTS if k.startswith("FSDP2: ") and k != "FSDP2: frozen"])
@on_ranks(2)
def test_22_changed_on_one_rank_only(rank: int, kind: str, way: str) -> str:
    build, changed = LAYOUTS[kind]
    model = build()
    with clipping(way, model) as clip:
        for step in range(2):
            planted(model, step)
            assert_right(clip, model)
        model.zero_grad()
        groups = [fully_shard(nn.Linear(8, 5), mesh=mesh1(2))]
        if rank == 1:
            changed(model) if changed is not sharded_head else model.__setitem__(2, groups[0])
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        error = raised(clip)
        assert error == "OwnershipError"
        return error


@pytest.mark.parametrize("calls", [1, 3, 7])
@pytest.mark.parametrize("way", ["clip", "step", "accelerate"])
@on_ranks(2)
def test_22_changed_on_one_replica_where_they_are_compared(rank: int, way: str, calls: int) -> str:
    """Replicas have no collective but at calls 1, 2, 4, 8: there they tell each other."""
    model = mlp()
    with clipping(way, model) as clip:
        for step in range(calls):
            fill(model, seed=step)
            assert_right(clip, model)
        if rank == 1:
            model[1] = nn.Linear(8, 8)
        fill(model, seed=7)
        error = raised(clip)
        assert error == "OwnershipError"
        return error


@pytest.mark.parametrize("before", ["nothing", "gradients", "described"])
@pytest.mark.parametrize("way", WITHOUT_OVERLAP)
@on_ranks(2)
def test_22_frozen_with_gradients(rank: int, way: str, before: str) -> None:
    """Thawed for the backward pass only, as a GAN's parts are; or gradients that the program has written."""
    model = mlp()
    with clipping(way, model) as clip:
        if before == "nothing":
            model.requires_grad_(False)
            for p in model.parameters():
                p.grad = None
            (clip if clip.clipper is None else clip.clipper.clip)()
        elif before == "gradients":
            model[2].requires_grad_(False)
            fill(model)
            assert_right(clip, model)
        elif clip.clipper is not None:
            model.requires_grad_(False)
            clip.clipper.describe()
        for step in range(3):
            model.requires_grad_(True)
            fill(model, seed=step)
            model.requires_grad_(False)
            assert_right(clip, model)


# Every step other parameters train, as in a GAN, or thaw one after the other.
@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("build", [mlp, sharded])
@on_ranks(2)
def test_22_taking_turns(rank: int, build: Callable[[], nn.Sequential], way: str) -> None:
    model = build()
    with clipping(way, model) as clip:
        for step in range(6):
            model.zero_grad()
            for i, layer in enumerate(model):
                layer.requires_grad_(i == step % 3 or step == 5)
            planted(model, step)
            assert_right(clip, model)


@pytest.mark.parametrize("way", WITHOUT_OVERLAP)
@on_ranks(2)
def test_22_wrapped_in_ddp_afterwards(rank: int, way: str) -> None:
    model = mlp()
    with clipping(way, model) as clip:
        for step in range(2):
            fill(model, seed=step)
            assert_right(clip, model)
        ddp = nn.parallel.DistributedDataParallel(model)
        for step in range(3):
            model.zero_grad()
            ddp(torch.full((2, 4), float(1 + rank + step))).sum().backward()
            assert_right(clip, model)


@pytest.mark.parametrize("who", ["all", "one"])
@pytest.mark.parametrize("way", ["clip", "step", "function"])
@on_ranks(2)
def test_22_a_stage_changes(rank: int, way: str, who: str) -> str:
    """Stages cannot know of each other's changes: both raise, unless both have changed."""
    model = mlp()

    def dense() -> list[Any]:
        mine = [(rank, p.grad.double()) for p in model.parameters() if p.grad is not None]
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, mine)
        return [g for part in everyone for _, g in part]

    with clipping(way, model, stages=dist.group.WORLD) as clip:
        for step in range(2):
            fill(model, 1.0 + rank, seed=step)
            assert_right(clip, model, dense)
        if who == "all" or rank == 1:
            model[1] = nn.Linear(8, 8)
        fill(model, 1.0 + rank, seed=7)
        if who == "one":
            assert raised(clip) == "OwnershipError"
            return ""
        for step in range(2):
            fill(model, 1.0 + rank, seed=step)
            assert_right(clip, model, dense)
    return ""


@pytest.mark.parametrize("who", [(0, 1, 3), (0, 1, 2), (1,), (0, 3)])
@pytest.mark.parametrize("way", ["clip", "step", "function"])
@on_ranks(4, timeout=25)
def test_22_stages_with_replicas_change(rank: int, way: str, who: tuple[int, ...]) -> None:
    """Each stage twice, and a step's message goes to one replica of each. Where both that get it have
    changed, they would plan anew with the others, who raise: they are told in the store why those do not
    come."""
    mesh = mesh2(2, 2, "pp", "dp")
    stage = rank // 2
    model = mlp()
    with clipping(way, model, stages=mesh["pp"]) as clip:
        for step in range(2):
            fill(model, 1.0 + stage, seed=step)
            clip()
        if rank in who:
            model[1] = nn.Linear(8, 8)
        fill(model, 1.0 + stage, seed=7)
        partner = rank ^ 2
        changed, has_partner_changed = rank in who, partner in who
        error = ""
        try:
            clip()
        except distclip.OwnershipError as caught:
            error = str(caught)
    if changed and has_partner_changed:
        assert re.search(r"since rank \d has raised: .*Change them on every rank", error), error
    elif changed or has_partner_changed:
        assert "Change them on every rank" in error
        assert "has raised" not in error
    else:
        assert not error


# --- what has been learned ------------------------------------------------------------------------------


NAMED = [
    "head", "inside a Sequential", "ModuleList.append", "ModuleList.pop", "ModuleDict swapped",
    "load_state_dict(assign=True)", "children in another order", "lora", "checkpointed", "a compiled child",
    "_modules replaced", "untied", "tied", "to meta and to_empty", "double()",
]  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_22_state_goes_on_by_name(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, strategy = Net(), distclip.AdaGC(warmup=1)
    clipper = distclip.Clipper(model, strategy)
    for step in range(3):
        fill(model, 1.0 + step, seed=step)
        clipper.clip()

    def learned() -> dict[str, float]:
        names = clipper.plan.names
        return dict(zip(names, strategy.average.tolist(), strict=True))

    before = learned()
    CHANGES[kind](model)
    with caplog.at_level(logging.INFO, logger="distclip"):
        after = learned()
    kept = before.keys() & after.keys()
    assert kept
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert all(math.isinf(after[n]) for n in after.keys() - kept)
    gone, fresh = before.keys() - kept, after.keys() - kept
    said = [r.getMessage() for r in caplog.records if "have changed" in r.getMessage()]
    assert len(said) == bool(gone or fresh)
    for names, word in ((gone, "gone"), (fresh, "new")):
        assert not names or f"{len(names)} {word}" in said[0]
    fill(model)
    clipper.clip()
    assert not math.isinf(min(learned().values()))


def test_22_clippers_and_models_that_are_copied() -> None:
    model = Net()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(BOUND))
    fill(model)
    assert_right(lambda: clipper.clip().total_norm, model)
    twin = copy.deepcopy(model)
    fill(twin, 3.0)
    assert_right(lambda: distclip.clip_grad_norm_(twin, BOUND), twin)
    again = pickle.loads(pickle.dumps(model))
    fill(again, 4.0)
    assert_right(lambda: distclip.clip_grad_norm_(again, BOUND), again)
    assert b"distclip." not in pickle.dumps(model)  # who loads it may not have us
    saved = io.BytesIO()
    torch.save({"head": model.head.weight, "state": model.state_dict()}, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True)["head"], model.head.weight)


def test_22_a_copied_clipper() -> None:
    model = nn.ModuleList([Net()])
    model.clipper = distclip.Clipper(model[0], distclip.GlobalNorm(BOUND))  # as trainers keep it
    fill(model)
    assert_right(lambda: model.clipper.clip().total_norm, model)
    twin = copy.deepcopy(model)
    fill(twin, 3.0)
    assert_right(lambda: twin.clipper.clip().total_norm, twin)
    fill(model, 2.0)
    assert_right(lambda: model.clipper.clip().total_norm, model)
