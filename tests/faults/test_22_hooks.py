"""22, in hooks: parameters that are replaced, added or unfrozen after the hooks were registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import hooks
from tests.harness import on_ranks
from tests.layouts import dtensor, mesh1

BOUND = 1e-3


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def lora(m: nn.Sequential) -> None:
    m.requires_grad_(False)
    m[0].adapter = nn.Linear(4, 4)
    m[0].register_forward_hook(lambda module, inputs, out: out + module.adapter(inputs[0]))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "head": lambda m: m.__setitem__(1, nn.Linear(4, 3)),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4))),
    "added": lambda m: m.insert(0, nn.Linear(4, 4)),
    "removed": lambda m: m.pop(0),
    "lora": lora,
    "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "frozen": lambda m: m[0].requires_grad_(False),
    "unfrozen": lambda m: m.requires_grad_(True),
    "double": lambda m: m.double(),
}
REGISTER: dict[str, Callable[..., hooks.Handle]] = {"value": hooks.clip_value, "norm": hooks.clip_norm}


def largest(kind: str, model: nn.Module) -> float:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return max(g.abs().max().item() if kind == "value" else g.norm().item() for g in found)


def passed(model: Any, scale: float = 10.0) -> None:
    model.zero_grad()
    p = next(model.parameters())
    (model(torch.ones(2, 4, dtype=p.dtype)).pow(2).sum() * scale).backward()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("when", ["gradient", "accumulated"])
@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("change", CHANGES)
def test_22_hooks_follow(change: str, kind: str, when: str, several: bool) -> None:
    model = net()
    if change == "unfrozen":
        model[0].requires_grad_(False)
    with REGISTER[kind]([model] if several else model, BOUND, when=when) as handle:
        passed(model)
        assert BOUND / 2 < largest(kind, model) <= BOUND * 1.001
        CHANGES[change](model)
        for _ in range(2):
            passed(model)
            assert BOUND / 2 < largest(kind, model) <= BOUND * 1.001
        handle.remove()
        passed(model)
        assert largest(kind, model) > BOUND * 2
    model.append(nn.Linear(model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).shape[1], 3))
    passed(model.float())
    assert largest(kind, model) > BOUND * 2


@pytest.mark.parametrize("change", ["head", "unfrozen", "assign"])
@on_ranks(2)
def test_22_hooks_in_replicas(rank: int, change: str) -> None:
    torch.manual_seed(0)
    model = net()
    if change == "unfrozen":
        model[0].requires_grad_(False)
    with hooks.clip_norm(model, BOUND, when="accumulated"):
        passed(DistributedDataParallel(model))
        CHANGES[change](model)
        passed(DistributedDataParallel(model))
        assert BOUND / 2 < largest("norm", model) <= BOUND * 1.001


@pytest.mark.parametrize("change", ["unfrozen", "replaced"])
@on_ranks(2)
def test_22_in_backward_changed_on_one_rank_only(rank: int, change: str) -> str:
    """Told in the step's message: both raise in the same step."""
    model = nn.Module()
    model.w = dtensor((4, 4), mesh1(2), Shard(0))
    model.b = nn.Parameter(torch.ones(2), requires_grad=False)
    clip = distclip.InBackward(model, lambda ps: torch.optim.SGD(ps, lr=0.0), distclip.GlobalNorm(1.0))
    told = ""
    for step in range(2):
        if step and rank == 1:
            model.b = nn.Parameter(torch.ones(2), requires_grad=False) if change == "replaced" else model.b
            model.b.requires_grad_(change == "unfrozen")
        model.w.to_local().square().sum().backward()
        if step == 0:
            clip.end_step()
            continue
        with pytest.raises(ValueError, match="have changed since InBackward was made") as caught:
            clip.end_step()
        told = str(caught.value)
    clip.remove()
    return told
