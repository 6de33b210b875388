"""32: AGC on sparse gradients: the rows that exist are clipped, as those of the dense gradient would be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests.harness import on_ranks

CLIPPING, EPS = 0.01, 1e-3


def agc(gradient: Tensor, weight: Tensor) -> Tensor:
    """The paper's, in float64, on dense gradients."""
    g, w = (t.double().reshape(t.shape[0] if t.dim() > 1 else 1, -1) for t in (gradient, weight))
    bound = CLIPPING * w.norm(dim=1, keepdim=True).clamp(min=EPS)
    norm = g.norm(dim=1, keepdim=True)
    return torch.where(norm > bound, g * bound / norm.clamp(min=1e-6), g).view(gradient.shape)


def coalesced() -> Tensor:
    return torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (6, 3)).coalesce()


def repeated() -> Tensor:
    return torch.sparse_coo_tensor([[4, 1, 4, 0]], torch.randn(4, 3), (6, 3))


def every_row() -> Tensor:
    return torch.sparse_coo_tensor([[5, 4, 3, 2, 1, 0]], torch.randn(6, 3), (6, 3))


def no_row() -> Tensor:
    return torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (6, 3))


def hybrid() -> Tensor:
    return torch.sparse_coo_tensor([[0, 3, 0]], torch.randn(3, 2, 5), (6, 2, 5))


def both_dims() -> Tensor:
    return torch.sparse_coo_tensor([[0, 3, 0, 3, 5], [1, 1, 2, 1, 0]], torch.randn(5), (6, 3))


def one_dim() -> Tensor:
    return torch.sparse_coo_tensor([[0, 3, 0]], torch.randn(3), (6,))


def dense_within() -> Tensor:
    return torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.int64), torch.randn(1, 6, 3), (6, 3))


def complex_rows() -> Tensor:
    return torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3, dtype=torch.complex64), (6, 3)).coalesce()


def half() -> Tensor:
    return torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3).bfloat16(), (6, 3))


def far_apart() -> Tensor:
    """Squares that float32 does not hold."""
    return torch.sparse_coo_tensor([[1, 2, 4]], torch.tensor([[1e25], [1e-25], [1.0]]).expand(3, 3), (6, 3))


KINDS = [
    coalesced,
    repeated,
    every_row,
    no_row,
    hybrid,
    both_dims,
    one_dim,
    dense_within,
    complex_rows,
    half,
    far_apart,
]


def model(make: Callable[[], Tensor], scale: float = 1.0) -> list[nn.Parameter]:
    torch.manual_seed(0)
    sparse = make()
    dense = nn.Parameter(torch.randn(4, 3))
    dense.grad = torch.randn(4, 3) * scale
    p = nn.Parameter(
        torch.randn(sparse.shape).to(sparse.dtype)
        * torch.arange(sparse.shape[0]).sign().view(-1, *[1] * (sparse.dim() - 1))
    )
    p.grad = sparse * scale
    return [dense, p]


@pytest.mark.parametrize("way", ["clip", "step", "scaler", "param_norms", "twice"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_32_rows_that_exist(make: Callable[[], Tensor], way: str) -> None:
    scale = 1024.0 if way == "scaler" else 1.0
    ps = model(make, scale)
    whole = [p.grad.to_dense() / scale for p in ps if p.grad is not None]
    want = [agc_of_any(g, p.detach()) for g, p in zip(whole, ps, strict=True)]
    clipper = distclip.Clipper([("dense", ps[0]), ("sparse", ps[1])], distclip.AGC(CLIPPING, eps=EPS))
    before = [p.detach().clone() for p in ps]
    report = None
    if way in ("step", "scaler"):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if way == "scaler" else None
        if scaler is not None:
            scaler.scale(torch.ones(()))
        report = clipper.step(torch.optim.SGD(ps, lr=1.0), scaler)
        got = [(b - p.detach()) for b, p in zip(before, ps, strict=True)]
    else:
        for _ in range(2 if way == "twice" else 1):
            report = report or clipper.clip(param_norms=way == "param_norms")
        if way == "twice":
            clipper.clip()
        got = [p.grad.to_dense() for p in ps if p.grad is not None]
    low = whole[1].dtype == torch.bfloat16
    for g, w in zip(got, want, strict=True):
        rough = way in ("step", "scaler")
        torch.testing.assert_close(
            g.to(w.dtype), w, rtol=2e-2 if low else 1e-5, atol=(1e-2 if low else 1e-6) if rough else 1e-12
        )
    assert report is not None
    norms = [torch.linalg.vector_norm(g.to(w.dtype)).item() for g, w in zip(whole, want, strict=True)]
    assert report.total_norm.item() == pytest.approx(math.hypot(*norms), rel=1e-5)
    if way == "param_norms":
        assert [n.item() for n in report.param_norms.values()] == pytest.approx(norms, rel=1e-5)
    assert ps[1].grad is not None
    assert (ps[1].grad.layout is torch.sparse_coo) == (make is not dense_within)


def agc_of_any(gradient: Tensor, weight: Tensor) -> Tensor:
    if not gradient.is_complex():
        return agc(gradient, weight)
    real = agc(
        torch.view_as_real(gradient.to(torch.complex128)), torch.view_as_real(weight.to(torch.complex128))
    )
    return torch.view_as_complex(real)


def test_32_excluded() -> None:
    ps = model(coalesced)
    assert ps[1].grad is not None
    before = ps[1].grad.to_dense().clone()
    clipper = distclip.Clipper(
        [("dense", ps[0]), ("sparse", ps[1])], distclip.AGC(CLIPPING, exclude="sparse")
    )
    assert clipper.clip().clipped
    torch.testing.assert_close(ps[1].grad.to_dense(), before, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("make", [coalesced, repeated])
def test_32_not_finite(make: Callable[[], Tensor], policy: distclip.clipper.OnNonfinite) -> None:
    ps = model(make)
    assert ps[1].grad is not None
    ps[1].grad._values()[0, 0] = math.nan
    before = ps[1].grad.to_dense().clone()
    report = distclip.Clipper(ps, distclip.AGC(CLIPPING), on_nonfinite=policy).clip()
    assert report.nonfinite
    after = ps[1].grad.to_dense()
    if policy == "skip":
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    elif policy == "zero":
        assert not after.any()
    else:
        assert after.isnan().any()


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: distclip.PerParameter(0.1),
        lambda: distclip.Value(0.1),
        lambda: distclip.Value(0.1, measure_direction=True),
        lambda: distclip.PerGroup({"sparse": 0.1}),
        lambda: distclip.Chain(distclip.PerParameter(0.5), distclip.Value(0.1)),
        lambda: distclip.Chain(distclip.Value(0.5), distclip.GlobalNorm(0.1)),
        lambda: distclip.AdaGC(),
    ],
)
@pytest.mark.parametrize("make", [coalesced, repeated, hybrid, both_dims])
def test_32_other_strategies_as_on_dense(
    make: Callable[[], Tensor], strategy: Callable[[], distclip.Strategy]
) -> None:
    of_sparse, of_dense = model(make), model(make)
    assert of_dense[1].grad is not None
    of_dense[1].grad = of_dense[1].grad.to_dense()
    for ps in (of_sparse, of_dense):
        distclip.Clipper([("dense", ps[0]), ("sparse", ps[1])], strategy()).clip()
    for a, b in zip(of_sparse, of_dense, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.to_dense(), b.grad, rtol=1e-6, atol=0)


@on_ranks(2)
def test_32_under_ddp(rank: int) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(8, 3, sparse=True), nn.Linear(3, 2))
    ddp, clipper = DDP(m), None
    for step in range(3):
        m.zero_grad()
        (ddp(torch.tensor([rank, 3 + step, 3 + step])).pow(2).sum() * 7).backward()
        ps = list(m.parameters())
        want = [agc(p.grad.to_dense(), p.detach()) for p in ps if p.grad is not None]
        clipper = clipper or distclip.Clipper(ddp, distclip.AGC(CLIPPING, eps=EPS))
        assert clipper.clip().clipped
        assert m[0].weight.grad.is_sparse
        for p, w in zip(ps, want, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.to_dense().double(), w, rtol=1e-5, atol=1e-12)
