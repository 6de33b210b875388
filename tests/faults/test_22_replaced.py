"""22: what a program does to its parameters after the first clip is found at the next one."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrizations, parametrize, prune

import distclip
from tests.faults.ways import ALL, BOUND, CLIPPERS, assert_right, clipping, fill


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
