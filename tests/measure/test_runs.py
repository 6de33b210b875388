"""Gradients that lie side by side, taken as one: whatever happens to them from step to step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip.decide.transfer import on_device
from distclip.measure import meter, slots
from distclip.measure.gradients import Gradients
from tests import oracle


def _parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def _adjacent(parameters: list[nn.Parameter], gap: int = 0) -> None:
    """Gradients as views of one new buffer, ``gap`` elements of it between them."""
    flat = torch.randn(sum(p.numel() + gap for p in parameters), dtype=parameters[0].dtype)
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view(p.shape)
        at += p.numel() + gap


def collected(clipper: distclip.Clipper) -> Gradients:
    _ = clipper.plan
    measurement = clipper._clipping.parameters.measurement
    assert measurement is not None
    return measurement.collect(clipper.tensors)


def _tensors(clipper: distclip.Clipper) -> list[list[int]]:
    """The sizes of what is measured, by bucket."""
    return [[t.numel() for t in bucket.tensors] for bucket in collected(clipper).buckets]


def _check(clipper: distclip.Clipper, parameters: list[nn.Parameter]) -> None:
    whole: list[Tensor] = []
    for p in parameters:
        if p.grad is not None and not any(p.grad is g for g in whole):
            whole.append(p.grad)
    before = [g.clone() for g in whole]
    report = clipper.clip()
    assert report.total_norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    for gradient, was in zip(whole, before, strict=True):
        torch.testing.assert_close(gradient, was * report.coefficient, rtol=1e-5, atol=0)


def test_runs_and_their_change() -> None:
    parameters = _parameters((5, 3), (7,), (2, 2))
    clipper = distclip.Clipper(parameters, distclip.GlobalNorm(0.1))
    for make, sizes in (
        (lambda: _adjacent(parameters), [[26]]),
        (lambda: _adjacent(parameters), [[26]]),  # in another place
        (lambda: _adjacent(parameters[::-1]), [[26]]),  # in another order
        (lambda: _adjacent(parameters, gap=1), [[15, 7, 4]]),
        (lambda: setattr(parameters[1], "grad", torch.ones(7)), None),
        (lambda: setattr(parameters[1], "grad", None), None),
    ):
        make()
        _check(clipper, parameters)
        if sizes is not None:
            assert _tensors(clipper) == sizes


def test_gradients_that_come_together_later() -> None:
    parameters = _parameters((5, 3), (7,))
    clipper = distclip.Clipper(parameters, distclip.GlobalNorm(0.1))
    found = []
    for step in range(8):
        _adjacent(parameters, gap=1 if step < 3 else 0)
        _check(clipper, parameters)
        found.append(_tensors(clipper))
    assert found[:3] == [[[15, 7]]] * 3
    assert found[-1] == [[22]]


def test_gradients_that_shared_memory_once() -> None:
    parameters = _parameters((4, 3), (4, 3))
    clipper = distclip.Clipper(parameters, distclip.GlobalNorm(0.1))
    parameters[0].grad = parameters[1].grad = torch.randn(4, 3)
    for _ in range(3):
        _check(clipper, parameters)
    parameters[1].grad = torch.randn(4, 3)
    _check(clipper, parameters)


def test_different_dtypes_are_not_one_run() -> None:
    memory = torch.randn(64)
    parameters = [*_parameters((4,)), *_parameters((8,), dtype=torch.bfloat16)]
    parameters[0].grad = memory[:4]
    parameters[1].grad = memory.view(torch.bfloat16)[8:16].normal_()
    clipper = distclip.Clipper(parameters, distclip.GlobalNorm(1e9))
    for _ in range(2):
        assert clipper.clip().total_norm.item() == pytest.approx(
            oracle.norm([p.grad for p in parameters]), rel=1e-6
        )
    assert sorted(_tensors(clipper)) == [[4], [8]]


def test_groups_are_runs_of_their_own() -> None:
    parameters = _parameters((4,), (4,), (4,))
    named = list(zip(("a", "b", "c"), parameters, strict=True))
    clipper = distclip.Clipper(named, distclip.PerGroup({"a": 1.0, "*": 2.0}))
    _adjacent(parameters)
    clipper.clip()
    assert _tensors(clipper) == [[4, 8]]


def test_neighbours_by_chance_belong_to_different_owners() -> None:
    """Four tensors side by side in one piece of memory, which torch believes to be two."""
    parameters = _parameters((3,), (2,), (4,), (1,))
    memory = bytearray(40)
    first = torch.frombuffer(memory, dtype=torch.float32, count=5)
    second = torch.frombuffer(memory, dtype=torch.float32, offset=20, count=5)
    for were_one_run in (False, True):
        clipper = distclip.Clipper(parameters, distclip.GlobalNorm(0.1))
        if were_one_run:
            _adjacent(parameters)
            _check(clipper, parameters)
            assert _tensors(clipper) == [[10]]
        first.normal_()
        second.normal_()
        for p, gradient in zip(parameters, [*first.split([3, 2]), *second.split([4, 1])], strict=True):
            p.grad = gradient
        _check(clipper, parameters)
        assert _tensors(clipper) == [[5, 5]]


def test_nothing_to_measure() -> None:
    parameters = _parameters((3,), (0,))
    clipper = distclip.Clipper(parameters, distclip.GlobalNorm(0.1))
    for gradients in ((None, None), (None, torch.zeros(0)), (torch.ones(3), torch.zeros(0)), (None, None)):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        assert clipper.clip().total_norm.item() == pytest.approx(0.0 if gradients[0] is None else 3**0.5)


def test_runs_come_in_the_order_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they lie: ranks add in the same order, and nothing is brought to a device again."""
    parameters = _parameters(*((n,) for n in (700, 5, 300, 90, 11, 2000)))
    clipper = distclip.Clipper(parameters, distclip.PerParameter(1e-3))
    _ = clipper.plan
    brought = []
    for module in (meter, slots):
        monkeypatch.setattr(
            module, "on_device", lambda values, *to: brought.append(values) or on_device(values, *to)
        )
    for call in range(9):  # all are looked at anew at calls 1, 2, 4 and 8
        ordered = sorted(parameters, key=lambda p: hash((call, p.numel())))
        _adjacent(ordered, gap=1)
        for bucket in collected(clipper).buckets:
            assert bucket.parameters == [0, 1, 2, 3, 4, 5]
        _check_each(clipper, parameters)
    assert len(brought) == 3  # the shares, the slots, and those of all parameters


def _check_each(clipper: distclip.Clipper, parameters: list[nn.Parameter]) -> None:
    before = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    clipper.clip()
    for p, was in zip(parameters, before, strict=True):
        expected = was * min(1.0, 1e-3 / (oracle.norm([was]) + 1e-6))
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=0)
