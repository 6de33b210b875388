"""The report of a step: what it says, and what reading it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import distclip
from tests.counting import count_host_syncs


def clipped(
    strategy: distclip.Strategy, *gradients: list[float], param_norms: bool = False
) -> distclip.ClipReport:
    named = [(f"w{i}", nn.Parameter(torch.zeros(len(g)))) for i, g in enumerate(gradients)]
    for (_, parameter), gradient in zip(named, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return distclip.Clipper(named, strategy).clip(param_norms=param_norms)


def test_numbers() -> None:
    report = clipped(distclip.GlobalNorm(1.0), [3.0], [0.0, 4.0])
    assert report.to_dict() == {
        "total_norm": 5.0,
        "clipped_norm": pytest.approx(1.0, rel=1e-6),
        "coefficient": pytest.approx(0.2, rel=1e-6),
        "threshold": 1.0,
        "clipped": True,
        "nonfinite": False,
        "skipped": False,
    }


@pytest.mark.parametrize(
    ("strategy", "gradient", "says"),
    [
        (distclip.GlobalNorm(1.0), [3.0, 4.0], "norm 5 → 1 (×0.2)"),
        (distclip.GlobalNorm(1.0), [3.41, 0.0], "norm 3.41 → 1 (×0.293)"),
        (distclip.GlobalNorm(9.0), [3.0, 4.0], "norm 5"),
        (distclip.GlobalNorm(1.0), [3.0, math.nan], "norm nan, not finite, skipped"),
        (distclip.GlobalNorm(1.0), [3.0, math.inf], "norm inf, not finite, skipped"),
        (distclip.Value(2.0), [3.0, -4.0], "norm 4 → 2 (×0.5)"),
    ],
)
def test_prints(strategy: distclip.Strategy, gradient: list[float], says: str) -> None:
    report = clipped(strategy, gradient)
    assert str(report) == says
    assert f"{report}" == says


def test_reading_is_one_transfer() -> None:
    report = clipped(distclip.GlobalNorm(1.0), [3.0, 4.0])
    with count_host_syncs() as syncs:
        report.to_dict()
    assert syncs.count <= 7  # on the CPU `.tolist()` reads each of the seven numbers in place
    with count_transfers() as transfers:
        report.to_dict()
    assert transfers.tensors == 1


class count_transfers:
    """Counts tensors whose values are taken to the host, each of which waits for the device once."""

    def __enter__(self) -> count_transfers:
        self.tensors = 0
        self._patch = pytest.MonkeyPatch()
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            self._patch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))
        return self

    def _counting(self, method):  # type: ignore[no-untyped-def]
        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            self.tensors += 1
            return method(*args, **kwargs)

        return counted

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def test_fields_are_zero_dim_tensors() -> None:
    report = clipped(distclip.GlobalNorm(1.0), [3.0, 4.0])
    for name in ("total_norm", "clipped_norm", "coefficient", "threshold"):
        tensor = getattr(report, name)
        assert (tensor.dim(), tensor.dtype) == (0, torch.float32), name
    for name in ("clipped", "nonfinite", "skipped"):
        tensor = getattr(report, name)
        assert (tensor.dim(), tensor.dtype) == (0, torch.bool), name


def test_param_norms() -> None:
    for report in (
        clipped(distclip.GlobalNorm(1.0), [3.0], [0.0, 4.0], param_norms=True),
        clipped(distclip.PerParameter(1.0), [3.0], [0.0, 4.0]),
    ):
        assert {name: norm.item() for name, norm in report.param_norms.items()} == {"w0": 3.0, "w1": 4.0}
        assert report.total_norm.item() == 5.0


def test_param_norms_that_were_not_asked_for() -> None:
    report = clipped(distclip.GlobalNorm(1.0), [3.0])
    with pytest.raises(RuntimeError, match=r"clip\(param_norms=True\)"):
        _ = report.param_norms


def test_report_is_frozen() -> None:
    report = clipped(distclip.GlobalNorm(1.0), [3.0])
    with pytest.raises(AttributeError):
        report.total_norm = torch.tensor(0.0)  # type: ignore[misc]


def test_outlives_the_step() -> None:
    """The numbers of a report stay when the next step is measured."""
    w = nn.Parameter(torch.zeros(2))
    clipper = distclip.Clipper([w], distclip.GlobalNorm(1.0))
    w.grad = torch.tensor([3.0, 4.0])
    first = clipper.clip()
    w.grad = torch.tensor([30.0, 40.0])
    clipper.clip()
    assert first.total_norm.item() == 5.0
