"""AGC: units split over ranks in every way count as wholes. Value's direction, and SPAM, beside it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests import oracle
from tests.counting import count_host_syncs
from tests.harness import on_row
from tests.layouts import LAYOUTS, Case

CLIPPING, EPS = 0.05, 1e-3
DECLARED = ("declared_tensor_parallel", "declared_partial", "declared_experts")
FSDP1 = [name for name in LAYOUTS if name.startswith("fsdp1")]
SEEN_WHOLE = {n: row for n, row in LAYOUTS.items() if n not in (*DECLARED, *FSDP1)}


def unitwise(g: Tensor, w: Tensor) -> Tensor:
    """The formula, on whole float64 tensors."""
    dims = list(range(1, g.dim())) or None
    norm = torch.linalg.vector_norm(g, dim=dims, keepdim=dims is not None)
    bound = CLIPPING * torch.linalg.vector_norm(w, dim=dims, keepdim=dims is not None).clamp(min=EPS)
    return torch.where(norm > bound, g * bound / norm.clamp(min=1e-6), g)


def built(row: str) -> Case:
    case = LAYOUTS[row].build()
    distclip.total_grad_norm(case.parameters, **case.kwargs)  # makes a plan, with what it asks
    case.backward(3)
    return case


@on_row(SEEN_WHOLE)
def test_equals_the_formula_on_whole_tensors(row: str) -> str:
    case = built(row)
    before = case.dense()
    clipper = distclip.Clipper(case.parameters, distclip.AGC(CLIPPING, eps=EPS), **case.kwargs)
    assert clipper.plan is not None
    with CommDebugMode() as comm, count_host_syncs() as syncs:
        report = clipper.clip()
    assert comm.get_total_counts() == LAYOUTS[row].collectives
    assert syncs.count <= 1
    assert report.clipped.item()
    after = case.dense()
    for name, parameter in case.named.items():
        key = name if name in after else next((k for k in after if k.endswith("." + name)), None)
        if key is None or case.stage not in key:
            continue
        want = unitwise(before[key], oracle.dense(parameter))  # type: ignore[arg-type]
        tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(parameter.dtype, 1e-5)
        assert torch.allclose(after[key], want, rtol=tolerance, atol=1e-8), name
    assert report.clipped_norm.item() == pytest.approx(oracle.norm(after.values()), rel=1e-2)
    return str(report)


@on_row(
    {name: LAYOUTS[name] for name in FSDP1 if name not in ("fsdp1_mixed_precision", "fsdp1_nested_groups")}
)
def test_flat_shards_equal_the_unsharded_model(row: str) -> list[float]:
    """FSDP1 cuts rows anywhere; the same model under DDP has them whole."""
    flat = built(row)
    whole = LAYOUTS["ddp"].build()
    whole.backward(3)
    reports = [
        distclip.Clipper(case.parameters, distclip.AGC(CLIPPING, eps=EPS)).clip(param_norms=True)
        for case in (flat, whole)
    ]
    norms = [(r.total_norm.item(), r.clipped_norm.item()) for r in reports]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    got, want = (oracle.norm(case.dense().values()) for case in (flat, whole))
    assert got == pytest.approx(want, rel=1e-5)
    assert got == pytest.approx(norms[0][1], rel=1e-5)
    assert math.hypot(*reports[0].param_norms.values()) == pytest.approx(norms[0][0], rel=1e-5)
    return list(norms[0])


@on_row({name: LAYOUTS[name] for name in DECLARED})
def test_declared_shards_are_refused(row: str) -> None:
    case = LAYOUTS[row].build()
    with pytest.raises(ValueError, match="does not say along which dim"):
        distclip.Clipper(case.parameters, distclip.AGC()).clip()


@on_row({name: LAYOUTS[name] for name in ("single", "fsdp2_tensor_parallel", "pipeline")})
def test_excluded_parameters_are_left_alone(row: str) -> None:
    case = built(row)
    before = case.dense()
    distclip.Clipper(case.parameters, distclip.AGC(CLIPPING, exclude=["*bias"]), **case.kwargs).clip()
    changed = {name for name, after in case.dense().items() if not torch.equal(after, before[name])}
    assert changed
    assert not any(name.endswith("bias") for name in changed)


def test_a_zero_weight_can_leave_zero() -> None:
    w = torch.nn.Parameter(torch.zeros(3, 4))
    w.grad = torch.ones(3, 4)
    distclip.Clipper([w], distclip.AGC(0.01)).clip()
    assert torch.linalg.vector_norm(w.grad, dim=1).tolist() == pytest.approx([0.01 * 1e-3] * 3)


@on_row({n: row for n, row in LAYOUTS.items() if n != "single_mixed_dtypes"})
def test_value_measures_its_direction(row: str) -> list[float]:
    case = built(row)
    before = torch.cat([g.flatten() for g in case.dense().values()])
    bound = 0.3 * before.abs().max().item()
    clipper = distclip.Clipper(case.parameters, distclip.Value(bound, measure_direction=True), **case.kwargs)
    assert clipper.plan is not None
    with CommDebugMode() as comm:
        report = clipper.clip()
    assert comm.get_total_counts() == LAYOUTS[row].collectives
    after = torch.cat([g.flatten() for g in case.dense().values()])
    assert report.direction is not None
    want = F.cosine_similarity(before, after, dim=0).item()
    assert report.direction.item() == pytest.approx(want, rel=1e-4)
    assert report.direction.item() < 1
    assert report.total_norm.item() == pytest.approx(before.norm().item(), rel=1e-5)
    assert report.clipped_norm.item() == pytest.approx(after.norm().item(), rel=1e-3)
    return [report.direction.item(), report.clipped_norm.item()]


@on_row(
    {
        name: LAYOUTS[name]
        for name in ("single", "ddp", "fsdp2", "fsdp1_original_parameters", "tensor_parallel")
    }
)
def test_spam_clamps_against_the_second_moment(row: str) -> None:
    case = built(row)
    optimizer = torch.optim.AdamW(case.tensors, lr=1e-3)
    clipper = distclip.Clipper(case.parameters, distclip.SPAM(optimizer, threshold=4.0))
    first = case.dense()
    clipper.clip()
    assert all(torch.equal(g, first[name]) for name, g in case.dense().items())  # no moment yet
    optimizer.step()
    case.backward(5)
    there = [p for p in case.tensors if p.grad is not None]  # FSDP1: not on a rank without a shard
    before = [_local(p.grad).clone() for p in there]  # type: ignore[arg-type]
    clipper.clip()
    changed = 0
    for parameter, g in zip(there, before, strict=True):
        if g.numel():
            v = _local(optimizer.state[parameter]["exp_avg_sq"])
            want = torch.where(g.square() > 4 * v, g.sign() * (4 * v).sqrt(), g)
            assert torch.allclose(_local(parameter.grad), torch.where(v > 0, want, g), rtol=1e-5)  # type: ignore[arg-type]
            changed += int((_local(parameter.grad) != g).sum())  # type: ignore[arg-type]
    assert changed > 0


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def test_spam_says_what_it_needs() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    clipper = distclip.Clipper([w], distclip.SPAM(optimizer))
    w.grad = torch.ones(3)
    clipper.clip()
    optimizer.step()
    with pytest.raises(ValueError, match="SGD keeps no exp_avg_sq"):
        clipper.clip()
    del optimizer
    with pytest.raises(ValueError, match="is gone"):
        clipper.clip()
