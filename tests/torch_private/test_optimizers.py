"""What is read of scalers, optimizers and modules, on the torch that is installed."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from distclip.torch_private import grad_scaler, modules, optimizers


def scaled() -> tuple[GradScaler, torch.optim.Optimizer, nn.Parameter]:
    w = nn.Parameter(torch.ones(2))
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scaler.scale(w.sum()).backward()
    return scaler, torch.optim.SGD([w], lr=0.1), w


def test_states() -> None:
    scaler, optimizer, _ = scaled()
    assert not grad_scaler.states(scaler)
    assert grad_scaler.states(scaler)[id(optimizer)]["stage"] is OptState.READY
    scaler.unscale_(optimizer)
    state = grad_scaler.states(scaler)[id(optimizer)]
    assert state["stage"] is OptState.UNSCALED
    assert [found.item() for found in state["found_inf_per_device"].values()] == [0.0]
    scaler.update()
    assert not grad_scaler.states(scaler)


def test_states_if_any() -> None:
    scaler, _, _ = scaled()
    assert grad_scaler.states_if_any(scaler) is grad_scaler.states(scaler)
    assert grad_scaler.states_if_any(None) is None
    assert grad_scaler.states_if_any(GradScaler("cpu", enabled=False)) is None


def test_set_states() -> None:
    scaler, optimizer, _ = scaled()
    fresh: Any = grad_scaler.states(scaler)
    kept = defaultdict[int, dict[str, Any]](fresh.default_factory)
    grad_scaler.set_states(scaler, kept)
    scaler.unscale_(optimizer)
    assert kept[id(optimizer)]["stage"] is OptState.UNSCALED
    scaler.update()
    assert grad_scaler.states(scaler) is not kept


def test_scale_of_and_set_scale() -> None:
    assert grad_scaler.scale_of(GradScaler("cpu")) is None
    scaler, optimizer, w = scaled()
    scale = grad_scaler.scale_of(scaler)
    assert scale is not None
    assert scale.item() == 8.0
    grad_scaler.set_scale(scaler, torch.tensor([4.0]))
    scaler.unscale_(optimizer)
    assert w.grad is not None
    assert w.grad.tolist() == [2.0, 2.0]
    grad_scaler.set_scale(scaler, scale)
    assert scaler.get_scale() == 8.0


def test_start() -> None:
    scaler = GradScaler("cpu", init_scale=16.0)
    grad_scaler.start(scaler, torch.device("cpu"))
    scale = grad_scaler.scale_of(scaler)
    assert scale is not None
    assert scale.item() == 16.0


def test_device_of_and_is_on() -> None:
    assert grad_scaler.device_of(GradScaler("cpu")) == "cpu"
    assert grad_scaler.is_on(GradScaler("cpu"))
    assert not grad_scaler.is_on(GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_scales_and_skips(kind: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    assert optimizers.scales_and_skips(kind([w], lr=0.1, fused=True))
    assert not optimizers.scales_and_skips(kind([w], lr=0.1))


def test_has_step_hooks() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    assert optimizers.has_step_hooks(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    assert not optimizers.has_step_hooks(Bare())
    assert not optimizers.has_step_hooks(object())


def test_steps_in_backward() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its module calls torch.jit.script
        from torch.distributed.optim import _apply_optimizer_in_backward
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    _apply_optimizer_in_backward(torch.optim.SGD, [w], {"lr": 0.1})
    assert optimizers.steps_in_backward(w)
    assert not optimizers.steps_in_backward(other)


def test_what_modules_hold() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    assert modules.children_of(module) == {"0": module[0]}
    assert modules.parameters_of(module[0]) == {"weight": module[0].weight, "bias": module[0].bias}
    held = modules.held_by(vars(module))
    assert held[0] is modules.parameters_of(module) is vars(module)[modules.PARAMETERS]
    assert held[1] is modules.children_of(module) is vars(module)[modules.CHILDREN]


def test_persistent_and_transient_buffers() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("lost", torch.zeros(1), persistent=False)
    assert set(modules.persistent_buffers(module)) == {"kept"} == set(module.state_dict())
    assert set(modules.transient_buffers(module)) == {"lost"}


def test_wrappers() -> None:
    """(DDP and FSDP1, which need a group: test_modules_over_ranks.py.)"""
    inner = nn.Linear(2, 2)
    wrapped: dict[str, Any] = {
        "_orig_mod": torch.compile(inner, backend="eager"),
        "_checkpoint_wrapped_module": checkpoint_wrapper(inner),
        "module": nn.DataParallel(inner),
    }
    for attribute, wrapper in wrapped.items():
        assert modules.children_of(wrapper)[attribute] is inner, attribute
        assert isinstance(wrapper, modules.wrapper_classes(attribute, sys.modules)), attribute
        assert not isinstance(inner, modules.wrapper_classes(attribute, sys.modules))
        assert modules.wrapper_classes(attribute, {}) == ()
    assert wrapped.keys() | {"_fsdp_wrapped_module"} == modules.WRAPPERS.keys()
