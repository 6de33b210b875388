"""Whether modules still hold the very objects that were read, whatever these are equal to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distclip.layout.source import witness_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.one = nn.Parameter(torch.ones(1))
        self.many = nn.Parameter(torch.ones(3))
        self.none = nn.Parameter(torch.ones(0))
        self.register_parameter("absent", None)
        self.part = nn.Linear(2, 2)
        self.empty = nn.Sequential()


def equal(name: str) -> Callable[[Any], None]:
    return lambda m: setattr(m, name, nn.Parameter(getattr(m, name).detach().clone()))


def held(name: str) -> Callable[[Any], None]:
    """In the dictionary itself, where torch's own hooks see nothing."""
    return lambda m: m._parameters.__setitem__(name, nn.Parameter(m._parameters[name].detach().clone()))


CHANGES: dict[str, Callable[[Any], Any]] = {
    **{f"an equal {name}": equal(name) for name in ("gain", "one", "many", "none")},
    **{f"an equal {name} in the dictionary": held(name) for name in ("gain", "one", "many", "none")},
    "a parameter where none was": lambda m: setattr(m, "absent", nn.Parameter(torch.ones(1))),
    "none where one was": lambda m: setattr(m, "gain", None),
    "one more": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
    "one less": lambda m: delattr(m, "one"),
    "another name": lambda m: m._parameters.__setitem__("new", m._parameters.pop("one")),
    "two that have changed places": lambda m: m._parameters.update(gain=m.one, one=m.gain),
    "an equal module": lambda m: setattr(m, "part", nn.Linear(2, 2)),
    "a module in what was empty": lambda m: m.empty.append(nn.Identity()),
    "an equal parameter further in": lambda m: equal("bias")(m.part),
    "another's dictionaries": lambda m: m.__dict__.update(Net().__dict__),
    "no dictionaries": lambda m: m.__dict__.pop("_parameters"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_objects(change: str) -> None:
    model: Any = Net()
    witness = witness_of(model)
    found = witness.tensors(model)
    assert found is not None
    assert [id(t) for t in found] == [id(p) for p in model.parameters()]
    CHANGES[change](model)
    assert witness.tensors(model) is None


SAME: dict[str, Callable[[Any], Any]] = {
    "values": lambda m: m.gain.data.fill_(2.0),
    "NaN": lambda m: m.one.data.fill_(float("nan")),
    "frozen": lambda m: m.requires_grad_(False),
    "gradients": lambda m: m.many.sum().backward(),
    "mode": lambda m: m.eval(),
    "buffers": lambda m: m.register_buffer("b", torch.ones(1)),
    "a dictionary that holds the same": lambda m: m.__dict__.update(_parameters=dict(m._parameters)),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_objects(change: str) -> None:
    model: Any = Net()
    witness = witness_of(model)
    SAME[change](model)
    assert witness.tensors(model) is not None
