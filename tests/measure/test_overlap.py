"""Norms gathered during backward: the same numbers, and nothing left to measure after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import kernels
from distclip.measure import overlap
from tests import oracle
from tests.harness import on_ranks, on_row
from tests.laws.test_placements import bits, local
from tests.layouts import LAYOUTS, mesh2

# Where each gradient that is final is seen to be so, and where none is.
GATHERED = {
    "single", "ddp", "ddp_bucket_view", "fsdp2", "fsdp2_nested_uneven_empty", "fsdp2_bfloat16",
    "fsdp2_cpu_offload", "fsdp2_four_ranks", "hsdp", "fsdp2_tensor_parallel",
    "pipeline_fsdp2_tensor_parallel",
}  # fmt: skip
AFTERWARDS = {"fsdp1_flat_parameters", "fsdp1_original_parameters", "declared_tensor_parallel", "pipeline"}


@contextmanager
def measured_now() -> Iterator[list[int]]:
    """How many gradients are measured in here, by call."""
    sizes: list[int] = []

    def counting(tensors: list[Tensor], *args: Any) -> Tensor:
        sizes.append(len(tensors))
        return power_sums(tensors, *args)

    power_sums = kernels.power_sums
    with mock.patch.object(kernels, "power_sums", counting):
        yield sizes


@on_row(LAYOUTS)
def test_the_same_norms_and_gradients(row: str) -> list[float]:
    case = LAYOUTS[row].build()
    case.backward(1)
    n = distclip.total_grad_norm(case.parameters, **case.kwargs).item()
    usual = distclip.Clipper(case.parameters, distclip.GlobalNorm(0.7 * n), **case.kwargs)
    early = distclip.Clipper(case.parameters, distclip.GlobalNorm(0.7 * n), overlap=True, **case.kwargs)
    each = distclip.Clipper(case.parameters, distclip.PerParameter(0.2 * n), **case.kwargs)
    _ = usual.plan, early.plan  # which listens from here on
    norms = []
    for seed in (1, 2, 3):
        case.backward(seed)
        before = [None if t.grad is None else local(t.grad).clone() for t in case.tensors]
        expected = usual.clip(param_norms=True)
        after = bits(case)
        for tensor, gradient in zip(case.tensors, before, strict=True):
            if gradient is not None and LAYOUTS[row].collectives < 2:
                local(tensor.grad)[...] = gradient  # type: ignore[arg-type]
        report = early.clip(param_norms=True)
        if LAYOUTS[row].collectives < 2:  # else Partial gradients have been summed
            assert report.total_norm.item() == pytest.approx(expected.total_norm.item(), rel=1e-6)
            for name, norm in expected.param_norms.items():
                assert report.param_norms[name].item() == pytest.approx(norm.item(), rel=1e-6)
            for a, b in zip(bits(case), after, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        case.backward(seed)
        with measured_now() as sizes:
            report = early.clip()
        if row in GATHERED | AFTERWARDS:
            assert (sizes == []) == (row in GATHERED), sizes
        whole = oracle.norm(list(case.dense().values()))
        assert report.clipped_norm.item() == pytest.approx(
            whole, rel=1e-2 if "bf" in row or "mixed" in row else 1e-5
        )
        norms.append(report.total_norm.item())
    assert each.clip().total_norm.isfinite()
    return norms


@pytest.mark.parametrize("views", [False, True])
@on_ranks(2)
def test_accumulation_under_ddp(rank: int, views: bool) -> None:
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), gradient_as_bucket_view=views)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e-3), overlap=True)
    _ = clipper.plan
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        model.zero_grad()
        for i in range(3):
            with clipper.accumulate(3) as micro:
                micro.backward(model(torch.randn(4, 6, generator=generator)).square().sum())
            assert micro.complete == (i == 2)
        norm = oracle.norm([p.grad for p in model.parameters()])
        with measured_now() as sizes:
            report = clipper.clip()
        assert sizes == []
        assert report.total_norm.item() == pytest.approx(norm, rel=1e-6)


@on_ranks(2)
def test_one_clipper_after_another_on_the_same_ddp(rank: int) -> None:
    """DDP takes a hook once."""
    torch.manual_seed(0)
    model = DDP(nn.Linear(6, 5))
    clippers = [distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True) for _ in range(2)]
    for clipper in (*clippers, distclip.Clipper(model, distclip.ZClip(), overlap=True)):
        _ = clipper.plan
        model.zero_grad()
        model(torch.full((4, 6), rank + 1.0)).square().sum().backward()
        expected = oracle.norm([p.grad for p in model.parameters()])
        with measured_now() as sizes:
            assert clipper.clip().total_norm.item() == pytest.approx(expected, rel=1e-6)
        assert sizes == []


@on_ranks(2)
def test_ddp_averages_as_without(rank: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    listened = nn.Linear(6, 5)
    listened.load_state_dict(plain.state_dict())
    plain, listened = DDP(plain), DDP(listened)
    clipper = distclip.Clipper(listened, distclip.GlobalNorm(1e9), overlap=True)
    _ = clipper.plan
    del clipper
    gc.collect()  # its hook stays on DDP, and keeps on averaging
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    for model in (plain, listened):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), listened.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@on_ranks(4)
def test_fsdp2_within_a_pipeline(rank: int) -> None:
    """A stage reduces its gradients after backward, one by one, and not all in one backward pass."""
    mesh = mesh2(2, 2, "pp", "dp")
    torch.manual_seed(rank // 2)
    model = nn.Sequential(*(fully_shard(nn.Linear(6, 6), mesh=mesh["dp"]) for _ in range(2)))
    fully_shard(model, mesh=mesh["dp"])
    stage = PipelineStage(model, rank // 2, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, 2, lambda out, target: (out - target).square().sum())
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e-3), stages=mesh["pp"], overlap=True)
    _ = clipper.plan
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(rank % 2))
    for i in range(3):
        model.zero_grad(set_to_none=i == 0)
        schedule.step(*([x[i]] if rank < 2 else []), **({} if rank < 2 else {"target": -x[i]}))
        squares = torch.stack([local(p.grad).double().square().sum() for p in model.parameters()]).sum()
        dist.all_reduce(squares)
        assert clipper.clip().total_norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.randn(4, 6)).square().sum() * scale).backward()


CHANGES = {
    "another backward pass": lambda model: _backward(model),
    "in place": lambda model: model[0].weight.grad.mul_(3.0),
    "replaced": lambda model: setattr(model[2].weight, "grad", torch.ones(3, 5)),
    "gone": lambda model: setattr(model[2].weight, "grad", None),
    "all gone": lambda model: model.zero_grad(),
    "foreach": lambda model: torch._foreach_mul_([p.grad for p in model.parameters()], 2.0),
    "unscaled": lambda model: _unscale(model),
    "all-reduced": lambda model: [p.grad.data.mul_(2.0) for p in model.parameters()],
    "shared": lambda model: setattr(model[2].weight, "grad", model[2].weight.grad.view(3, 5)),
    "nothing": lambda model: None,
}


def _unscale(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_measured_again(change: str) -> None:
    model = _model()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True)
    _backward(model)
    clipper.clip()
    for _ in range(2):
        model.zero_grad()
        _backward(model)
        CHANGES[change](model)
        expected = oracle.norm([p.grad for p in model.parameters() if p.grad is not None] or [torch.zeros(1)])
        assert clipper.clip().total_norm.item() == pytest.approx(expected, rel=1e-6)


def test_tied_gradients_count_once() -> None:
    model = _model()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True)
    _backward(model)
    clipper.clip()
    model.zero_grad()
    _backward(model)
    model[0].bias.grad = model[2].weight.grad.view(-1)[:5]  # type: ignore[union-attr]
    model[2].weight.grad = None
    expected = oracle.norm([p.grad for p in model.parameters() if p.grad is not None])
    assert clipper.clip().total_norm.item() == pytest.approx(expected, rel=1e-6)


def test_a_gradient_that_backward_left_out() -> None:
    model = _model()
    unused = nn.Parameter(torch.zeros(7))
    clipper = distclip.Clipper([*model.parameters(), unused], distclip.GlobalNorm(1e9), overlap=True)
    _ = clipper.plan
    _backward(model)
    unused.grad = torch.ones(7)
    expected = oracle.norm([unused.grad, *(p.grad for p in model.parameters())])  # type: ignore[list-item]
    assert clipper.clip().total_norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_with_a_loss_scale(unscaled_before: bool) -> None:
    models = [_model(), _model()]
    clippers = [
        distclip.Clipper(m, distclip.GlobalNorm(0.5), overlap=early)
        for m, early in zip(models, (False, True), strict=True)
    ]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in models]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for seed in range(4):
        norms = []
        for model, clipper, scaler, optimizer in zip(models, clippers, scalers, optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 6)).square().sum()).backward()
            if unscaled_before:
                scaler.unscale_(optimizer)
            norms.append(clipper.step(optimizer, scaler).total_norm.item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_go_with_the_clipper() -> None:
    model = _model()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0), overlap=True)
    _ = clipper.plan
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    del clipper
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_deferred_touches_nothing_after_backward() -> None:
    model = _model()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(0.1), apply="deferred", overlap=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    _backward(model)
    clipper.step(optimizer)
    optimizer.zero_grad()
    _backward(model)
    gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    with measured_now() as sizes:
        report = clipper.step(optimizer)
    assert sizes == []
    assert report.total_norm.item() == pytest.approx(oracle.norm(gradients), rel=1e-6)


def test_what_wants_more_than_norms_says_so() -> None:
    for strategy in (distclip.AGC(), distclip.Value(1.0, measure_direction=True)):
        with pytest.raises(ValueError, match="more than norms"):
            distclip.Clipper(_model(), strategy, overlap=True)


def test_batches_are_measured_while_backward_runs() -> None:
    """Not all at its end."""
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0), overlap=True)
    _ = clipper.plan
    with mock.patch.object(overlap, "_BATCH", 1000), measured_now() as sizes:
        model(torch.randn(2, 40)).sum().backward()
    assert len(sizes) >= 4
    assert sum(sizes) == 8
    assert dist.is_initialized() is False


def test_gradients_of_unlike_streams_are_measured_apart() -> None:
    """On an accelerator, one that another stream brings may not be there yet. (These are made up.)"""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(6)))
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True)
    _ = clipper.plan
    stream_of = {id(p): i // 2 % 2 for i, p in enumerate(model.parameters())}
    brought = {}
    measured: list[set[int]] = []

    def stream(gradient: Tensor) -> int:
        owner = next(p for p in model.parameters() if p.grad is gradient)
        brought[gradient.data_ptr()] = stream_of[id(owner)]
        return stream_of[id(owner)]

    def noting(tensors: list[Tensor], *args: Any) -> Tensor:
        measured.append({brought[t.data_ptr()] for t in tensors})
        return power_sums(tensors, *args)

    power_sums = kernels.power_sums
    with (
        mock.patch.object(overlap, "_BATCH", 700),
        mock.patch.object(overlap, "_current_stream", stream),
        mock.patch.object(kernels, "power_sums", noting),
    ):
        model(torch.randn(3, 20)).square().sum().backward()
        assert {0} in measured
        assert {1} in measured
        assert all(len(streams) == 1 for streams in measured)
        norm = clipper.clip().total_norm.item()
    assert norm == pytest.approx(oracle.norm([p.grad for p in model.parameters()]), rel=1e-6)  # type: ignore[misc]
