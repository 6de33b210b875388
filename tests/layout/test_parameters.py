"""What may be passed as ``parameters``, and what every parameter is then called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip.layout.parameters import named_parameters


def model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(5, 3)).pow(2).sum().backward()
    return model


def names(parameters: Any) -> list[str]:
    return [p.name for p in named_parameters(parameters)]


def total(*gradients: Tensor | None) -> float:
    return torch.cat([g.double().flatten() for g in gradients if g is not None]).norm().item()


SOURCES: dict[str, Any] = {
    "module": lambda m: m,
    "modules": lambda m: list(m),
    "module generator": lambda m: m.children(),
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "optimizer with names": lambda m: torch.optim.SGD(m.named_parameters(), 0.1),
    "optimizer groups": lambda m: torch.optim.SGD([{"params": x.parameters()} for x in m], 0.1),
    "generator": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "tuple": lambda m: tuple(m.parameters()),
    "set": lambda m: set(m.parameters()),
    "named generator": lambda m: m.named_parameters(),
    "named list": lambda m: list(m.named_parameters()),
    "module and parameters": lambda m: [m[0], *m[1].named_parameters()],
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_the_same_gradient(source: str) -> None:
    m = model()
    want = total(*(p.grad for p in m.parameters()))
    assert distclip.total_grad_norm(SOURCES[source](m)).item() == pytest.approx(want, rel=1e-6)
    assert distclip.clip_grad_norm_(SOURCES[source](m), 0.1).item() == pytest.approx(want, rel=1e-6)
    clipper = distclip.Clipper(SOURCES[source](m), distclip.GlobalNorm(0.05))
    assert clipper.clip().total_norm.item() == pytest.approx(0.1, rel=1e-4)
    assert clipper.clip().total_norm.item() == pytest.approx(0.05, rel=1e-4)  # also the second time
    distclip.clip_grad_value_(SOURCES[source](m), 2**-10)
    assert max(p.grad.abs().max().item() for p in m.parameters() if p.grad is not None) == 2**-10


def test_names() -> None:
    m = model()
    own = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names(m) == own
    assert names(m.named_parameters()) == own
    assert names(torch.optim.SGD(m.named_parameters(), 0.1)) == own
    assert names(list(m)) == [f"modules[{i}].{x}" for i in (0, 1) for x in ("weight", "bias")]
    assert names(m.parameters()) == [f"parameters[{i}]" for i in range(4)]
    groups = [{"params": list(x.parameters())} for x in m]
    assert names(torch.optim.SGD(groups, 0.1)) == [f"param_groups[{g}][{i}]" for g in (0, 1) for i in (0, 1)]
    assert [p.optimizer_group for p in named_parameters(torch.optim.SGD(groups, 0.1))] == [0, 0, 1, 1]


def test_names_reach_the_report() -> None:
    m = model()
    report = distclip.Clipper(m, distclip.PerParameter(1.0)).clip()
    assert list(report.param_norms) == names(m)
    with_groups = torch.optim.SGD([{"params": x.parameters()} for x in m], 0.1)
    before = [total(*(p.grad for p in x.parameters())) for x in m]
    distclip.Clipper(with_groups, distclip.PerGroup({0: 1e-2, 1: 1e4})).clip()
    after = [total(*(p.grad for p in x.parameters())) for x in m]
    assert after == pytest.approx([1e-2, before[1]], rel=1e-3)


def test_single_tensor() -> None:
    w = nn.Parameter(torch.ones(4))
    w.grad = torch.full((4,), 3.0)
    assert distclip.clip_grad_norm_(w, 1.0).item() == 6.0
    assert names(w) == ["parameter"]


def test_leaf_that_is_no_parameter() -> None:
    x = torch.ones(4, requires_grad=True)
    (x * 3).sum().backward()
    assert distclip.total_grad_norm(x).item() == 6.0


def test_frozen_parameters_cost_nothing() -> None:
    m = model()
    for p in m[0].parameters():
        p.requires_grad_(False)
        p.grad = None
    report = distclip.Clipper(m, distclip.PerParameter(1e4)).clip()
    assert list(report.param_norms) == ["1.weight", "1.bias"]
    m[0].weight.requires_grad_(True)  # unfrozen: counts from now on, gradient or not
    m[0].weight.grad = torch.full((4, 3), 2.0)
    want = total(*(p.grad for p in m.parameters()))
    assert distclip.total_grad_norm(m).item() == pytest.approx(want, rel=1e-6)


def test_unfrozen_between_two_clips() -> None:
    m = model()
    m[0].requires_grad_(False)
    m[0].weight.grad = m[0].bias.grad = None
    clipper = distclip.Clipper(m, distclip.GlobalNorm(1e4))
    few, few_again = clipper.clip().total_norm, distclip.total_grad_norm(m)
    assert few.item() == few_again.item() == pytest.approx(total(m[1].weight.grad, m[1].bias.grad), rel=1e-6)
    m[0].requires_grad_(True)
    m(torch.randn(5, 3)).pow(2).sum().backward()
    want = total(*(p.grad for p in m.parameters()))
    assert clipper.clip().total_norm.item() == pytest.approx(want, rel=1e-6)
    assert distclip.total_grad_norm(m).item() == pytest.approx(want, rel=1e-6)


def test_nothing_at_all() -> None:
    assert distclip.clip_grad_norm_([], 1.0).item() == 0.0
    distclip.clip_grad_value_([], 1.0)
    assert distclip.clip_grad_norm_(nn.ReLU(), 1.0).item() == 0.0
    untrained = nn.Linear(2, 2)
    for p in (0.5, 2.0, float("inf")):
        assert distclip.clip_grad_norm_(untrained, 1.0, p).item() == 0.0
    assert untrained.weight.grad is None


CALLS: dict[str, Any] = {
    "clip_grad_norm_": lambda source: distclip.clip_grad_norm_(source, 1.0),
    "clip_grad_value_": lambda source: distclip.clip_grad_value_(source, 1.0),
    "total_grad_norm": lambda source: distclip.total_grad_norm(source),
    "Clipper": lambda source: distclip.Clipper(source, distclip.GlobalNorm(1.0)).clip(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("wrong", "error", "quotes"),
    [
        (7, TypeError, "int"),
        (None, TypeError, "None"),
        ("weight", TypeError, "str"),
        (nn.Linear(2, 2).state_dict(), TypeError, "OrderedDict"),
        ([1.0, 2.0], TypeError, r"parameters\[0\].*float"),
        ([("weight", 3)], TypeError, "weight.*int"),
        ([(1, nn.Parameter(torch.ones(2)))], TypeError, r"parameters\[0\].*tuple"),
        ([torch.ones(3)], ValueError, r"parameters\[0\].*gradient"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, r"parameters\[0\].*leaf"),
    ],
)
def test_wrong_source(call: str, wrong: Any, error: type[Exception], quotes: str) -> None:
    with pytest.raises(error, match=quotes):
        CALLS[call](wrong)
