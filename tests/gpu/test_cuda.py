"""What only a GPU can show. The only tests that may be skipped, and only where there is no CUDA device."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

import distclip
from distclip.bench.counting import count_cuda_syncs
from tests import oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STRATEGIES = {
    "GlobalNorm": lambda: distclip.GlobalNorm(0.5),
    "GlobalNorm inf": lambda: distclip.GlobalNorm(0.5, float("inf")),
    "Value": lambda: distclip.Value(0.01),
    "PerParameter": lambda: distclip.PerParameter(0.1),
    "PerGroup": lambda: distclip.PerGroup({"*bias": 0.1, "*": 0.5}),
    "Percentile": lambda: distclip.Percentile(warmup=2),
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "AdaGC": lambda: distclip.AdaGC(warmup=2),
    "SkipSpikes": lambda: distclip.SkipSpikes(),
    "AGC": lambda: distclip.AGC(0.01),
    "Chain": lambda: distclip.Chain(distclip.PerParameter(0.5), distclip.GlobalNorm(0.5)),
}


def _model(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.LayerNorm(300), nn.Linear(300, 70)).to(device)


def _backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model(torch.randn(8, 64, generator=generator).to(device)).pow(2).sum().backward()


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_host_sync(name: str) -> None:
    """Law 3: once the plan is made, a step waits for nothing."""
    model = _model("cuda")
    clipper = distclip.Clipper(model, STRATEGIES[name]())
    for seed in range(14):  # the tenth is one at which advice about the threshold is thought of
        _backward(model, seed)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if seed >= 3 else "default")
        try:
            report = clipper.clip()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert report.total_norm.device.type == "cuda"
    assert report.total_norm.item() > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_as_on_the_cpu(name: str) -> None:
    on_gpu, on_cpu = _model("cuda"), _model("cpu")
    clippers = [distclip.Clipper(m, STRATEGIES[name]()) for m in (on_gpu, on_cpu)]
    for seed in range(5):
        for model in (on_gpu, on_cpu):
            _backward(model, seed)
        for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
            a.grad.copy_(b.grad)  # type: ignore[union-attr]
        reports = [clipper.clip() for clipper in clippers]
        assert reports[0].total_norm.item() == pytest.approx(reports[1].total_norm.item(), rel=1e-6)
        for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
            torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-5, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_accumulation(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.zeros(3_000_000, dtype=dtype, device="cuda"))
    w.grad = torch.randn(3_000_000, device="cuda").to(dtype)
    total = distclip.total_grad_norm([w])
    assert total.item() == pytest.approx(oracle.norm([oracle.dense(w.grad)]), rel=1e-6)


def test_fused_step_without_a_host_sync() -> None:
    model = _model("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    clipper = distclip.Clipper(model, distclip.GlobalNorm(0.5), apply="deferred")
    for seed in range(4):
        model.zero_grad()
        loss = model(torch.randn(8, 64, device="cuda")).pow(2).sum()
        scaler.scale(loss).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            report = clipper.step(optimizer, scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert report.clipped.item()


def test_the_bench_counts_what_waits() -> None:
    a = torch.ones(3, device="cuda")
    assert count_cuda_syncs(lambda: a.add_(1.0)) == 0
    assert count_cuda_syncs(lambda: a.sum().item()) == 1
    assert count_cuda_syncs(lambda: torch.tensor([1.0, 2.0], device="cuda")) == 1
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    gc.collect()  # a model that outlives its process group may abort the process
    dist.destroy_process_group()


def _sharded(mesh: DeviceMesh, *, offload: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4)))
    for module in (*model, model):
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        fully_shard(module, mesh=mesh, offload_policy=policy)
    return model if offload else model.cuda()


def _large_backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    torch.cuda._sleep(20_000_000)  # the host is ahead: what is not waited for is not there yet
    model(torch.randn(64, 2048, generator=generator).cuda()).pow(2).sum().backward()


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient, of one rank all of it."""
    return parameter.grad.to_local().double().cpu()  # type: ignore[union-attr]


@pytest.mark.parametrize("offload", [False, True])
def test_overlap_under_fsdp2(one_rank: DeviceMesh, offload: bool) -> None:
    """Measured on FSDP2's own streams."""
    model = _sharded(one_rank, offload=offload)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True)
    _ = clipper.plan
    for seed in range(4):
        _large_backward(model, seed)
        got = clipper.clip().total_norm.item()
        assert got == pytest.approx(oracle.norm(map(_whole, model.parameters())), rel=1e-6)


def test_offloaded_gradients_are_left_alone_below_the_threshold(one_rank: DeviceMesh) -> None:
    model = _sharded(one_rank, offload=True)
    _large_backward(model, 0)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9))
    gradients = [p.grad.to_local() for p in model.parameters()]  # type: ignore[union-attr]
    versions = [gradient._version for gradient in gradients]
    assert not clipper.clip().clipped.item()
    assert [gradient._version for gradient in gradients] == versions


@pytest.mark.parametrize("offload", [False, True])
def test_hooks_under_fsdp2(one_rank: DeviceMesh, offload: bool) -> None:
    """An offloaded gradient may still be on its way when the hook runs."""
    model = _sharded(one_rank, offload=offload)
    for seed in range(4):
        _large_backward(model, seed)
        want = [_whole(p).clamp(-0.01, 0.01) for p in model.parameters()]
        assert max(w.abs().max().item() for w in want) == pytest.approx(0.01, rel=1e-6)
        with distclip.hooks.clip_value(model, 0.01, when="accumulated"):
            _large_backward(model, seed)
        for p, w in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(_whole(p), w, rtol=1e-5, atol=1e-8)
