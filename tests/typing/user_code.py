"""What a user writes, and must type-check under ``mypy --strict``. Never run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import distclip


class HalfAboveOne(distclip.Strategy):
    """A strategy with state of its own."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, norms: distclip.Norms) -> distclip.Decision:
        self.steps += 1
        one = torch.ones_like(norms.total)
        return distclip.Scale(torch.where(norms.total > 1, 0.5 * one, one), threshold=one)


class Bound(distclip.Strategy):
    def forward(self, norms: distclip.Norms) -> distclip.Clamp:
        return distclip.Clamp(torch.ones_like(norms.total))


def drop_ins(model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup) -> None:
    assert_type(distclip.clip_grad_norm_(model, 1.0), Tensor)
    distclip.clip_grad_norm_(model.parameters(), 1, "inf", True, None)
    distclip.clip_grad_norm_(model.named_parameters(), 1.0, process_group=group)
    distclip.clip_grad_norm_([model, model], max_norm=1.0, norm_type=2)
    distclip.clip_grad_norm_(optimizer, 1.0, error_if_nonfinite=True)
    distclip.clip_grad_norm_(next(model.parameters()), 1.0)
    distclip.clip_grad_value_(model, 0.5)
    assert_type(distclip.total_grad_norm(list(model.parameters()), 2.0), Tensor)


def clipper(model: nn.Module, mesh: DeviceMesh) -> None:
    clip = distclip.Clipper(model, distclip.GlobalNorm(1.0), process_group=mesh["dp"], on_nonfinite="zero")
    report = clip.clip(param_norms=True)
    assert_type(report, distclip.ClipReport)
    assert_type(report.total_norm, Tensor)
    assert_type(report.param_norms, dict[str, Tensor])
    assert_type(report.to_dict(), dict[str, float | bool])
    clip.load_state_dict(clip.state_dict())
    for strategy in (
        HalfAboveOne(),
        Bound(),
        distclip.Value(0.5),
        distclip.PerParameter(1.0, norm_type="inf"),
        distclip.PerGroup({"embed.*": 0.1, "*": 1.0}),
        distclip.PerGroup({0: 0.1, 1: 1.0}),
    ):
        distclip.Clipper(torch.optim.SGD(model.parameters(), 0.1), strategy, accumulate=torch.float64)


def wrong(model: nn.Module) -> None:
    distclip.Clipper(model, 1.0)  # type: ignore[arg-type]
    distclip.Clipper(model, distclip.GlobalNorm(1.0), on_nonfinite="sometimes")  # type: ignore[arg-type]
    distclip.clip_grad_norm_(3, 1.0)  # type: ignore[arg-type]
