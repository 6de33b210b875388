"""34: a finite gradient is never called non-finite, and its norm is right wherever float64 can hold it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from tests import oracle
from tests.harness import on_ranks

LARGEST32 = torch.finfo(torch.float32).max
# Value of every element, dtype. The squares of all leave float32, or float64, or vanish there.
SIZES = {
    "float32, squares overflow": (1e19, torch.float32),
    "float32, the largest": (3e38, torch.float32),
    "float32, squares vanish": (1e-30, torch.float32),
    "float32, subnormal": (1e-42, torch.float32),
    "bfloat16": (2.0**127, torch.bfloat16),
    "bfloat16, small": (2.0**-120, torch.bfloat16),
    "float16": (6e4, torch.float16),
    "complex64": (1e19 - 1e19j, torch.complex64),
    "complex64, the largest": (3e38 + 3e38j, torch.complex64),
    "float64": (1e39, torch.float64),
    "float64, squares overflow": (1e160, torch.float64),
    "float64, the largest": (1e300, torch.float64),
    "float64, squares vanish": (1e-100, torch.float64),
    "complex128": (1e200 + 1e200j, torch.complex128),
}
POWERS = (0.5, 1.0, 2.0, 3.0, math.inf)
SHAPES = ((6, 5), (7,))


def norm_of(gradients: list[Tensor], p: float) -> float:
    """By scaling first: what is measured lies far outside of where powers can be taken."""
    flat = torch.cat(
        [g.to(torch.complex128 if g.is_complex() else torch.float64).abs().flatten() for g in gradients]
    )
    largest = flat.max().item()
    return largest * oracle.norm([flat / largest], p)


def make(size: str) -> nn.ParameterDict:
    value, dtype = SIZES[size]
    ps = nn.ParameterDict(
        {f"p{i}": nn.Parameter(torch.ones(shape, dtype=dtype)) for i, shape in enumerate(SHAPES)}
    )
    for i, p in enumerate(ps.values()):
        p.grad = torch.full_like(p, value) * (1 if i == 0 else 0.5)
    return ps


def approx(value: float, dtype: torch.dtype) -> object:
    return pytest.approx(value, rel=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5)


def as_reported(norm: float) -> float:
    return norm if norm <= LARGEST32 else math.inf


def gradients_of(ps: nn.ParameterDict) -> list[Tensor]:
    return [p.grad for p in ps.values() if p.grad is not None]


def through_backward(ps: nn.ParameterDict) -> None:
    """The same gradients, by backward."""
    wanted = gradients_of(ps)
    for p in ps.values():
        p.grad = None
    torch.autograd.backward([p * 1 for p in ps.values()], wanted)


Entrance = Callable[[nn.ParameterDict, float, float], Tensor | None]


def clip(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    report = distclip.Clipper(ps, distclip.GlobalNorm(bound, p)).clip()
    assert not report.nonfinite
    assert not report.skipped
    return report.total_norm


def overlapped(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    clipper = distclip.Clipper(ps, distclip.GlobalNorm(bound, p), overlap=True)
    _ = clipper.plan
    through_backward(ps)
    report = clipper.clip()
    assert not report.nonfinite
    return report.total_norm


def zeroing(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    clipper = distclip.Clipper(ps, distclip.GlobalNorm(bound, p), on_nonfinite="zero")
    return clipper.clip(param_norms=True).total_norm


def function(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    return distclip.clip_grad_norm_(ps.parameters(), bound, p, error_if_nonfinite=True)


def in_two(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    norm = distclip.get_total_norm(gradients_of(ps), p, error_if_nonfinite=True)
    exact = norm_of(gradients_of(ps), p)  # what float32 does not hold can be given as a number
    distclip.clip_grads_with_norm_(ps.parameters(), bound, norm if exact <= LARGEST32 else exact)
    return norm


def total(ps: nn.ParameterDict, bound: float, p: float) -> Tensor:
    norm = distclip.total_grad_norm(ps, p)
    distclip.clip_grad_norm_(ps, bound, p)
    return norm


def by_hook(ps: nn.ParameterDict, bound: float, p: float) -> None:
    del ps["p1"]  # each by its own norm
    with distclip.hooks.clip_norm(ps, bound, norm_type=p):
        through_backward(ps)


def by_late_hook(ps: nn.ParameterDict, bound: float, p: float) -> None:
    del ps["p1"]
    with distclip.hooks.clip_norm(ps, bound, norm_type=p, when="accumulated"):
        through_backward(ps)


def per_parameter(ps: nn.ParameterDict, bound: float, p: float) -> None:
    del ps["p1"]
    assert not distclip.Clipper(ps, distclip.PerParameter(bound, p)).clip().nonfinite


def per_group(ps: nn.ParameterDict, bound: float, p: float) -> None:
    del ps["p1"]
    assert not distclip.Clipper(ps, distclip.PerGroup({"p0": bound}, norm_type=p)).clip().nonfinite


ENTRANCES: list[Entrance] = [
    clip, overlapped, zeroing, function, in_two, total, by_hook, by_late_hook, per_parameter, per_group,
]  # fmt: skip


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda f: f.__name__)
def test_34_norm_and_clipped(entrance: Entrance, size: str, p: float) -> None:
    ps, dtype = make(size), SIZES[size][1]
    want = norm_of(gradients_of(ps), p)
    own = norm_of(gradients_of(ps)[:1], p)
    bound = 1.0
    before = [g.clone() for g in gradients_of(ps)]
    norm = entrance(ps, bound, p)
    if norm is not None:
        assert norm.item() == approx(as_reported(want), dtype)
    whole = want if norm is not None else own
    for b, a in zip(before, gradients_of(ps), strict=False):
        share = min(1.0, bound / (whole + 1e-6))
        got = [a.flatten()[0].to(torch.complex128) / b.flatten()[0].to(torch.complex128)]
        if dtype == torch.float16 or size in ("float32, subnormal", "bfloat16, small") or share < 1e-300:
            continue  # too few digits are left of them, or none
        if share * b.abs().max().item() > 1e-37 or dtype in (torch.float64, torch.complex128):
            assert abs(got[0].item() - share) <= share * (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("size", [s for s in SIZES if not SIZES[s][1].is_complex])
def test_34_step(size: str, deferred: bool, scale: float | None) -> None:
    ps, dtype = make(size), SIZES[size][1]
    if dtype in (torch.float16, torch.bfloat16) and deferred:
        dtype = torch.float32  # torch's fused SGD on the CPU leaves the first 16 elements of narrow ones out
        ps = make("float32, the largest")
    with torch.no_grad():
        for p in ps.values():
            p.zero_()
    want = norm_of(gradients_of(ps), 2) / (scale or 1)
    bound = 1.0
    optimizer = torch.optim.SGD(ps.parameters(), lr=1.0, fused=deferred)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    if scaler is not None:
        scaler.scale(torch.ones(()))
    clipper = distclip.Clipper(ps, distclip.GlobalNorm(bound), apply="deferred" if deferred else "inplace")
    report = clipper.step(optimizer, scaler)
    assert not report.nonfinite
    assert not report.skipped
    assert report.total_norm.item() == approx(as_reported(want), dtype)
    if scaler is not None:
        assert scaler.get_scale() == scale
    moved = norm_of([p.detach() for p in ps.values()], 2)
    if size not in ("float32, subnormal", "bfloat16, small", "float16"):
        assert moved == approx(min(want, bound * want / (want + 1e-6)), dtype)


STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "PerParameter": lambda: distclip.PerParameter(1.0),
    "PerGroup": lambda: distclip.PerGroup({"p0": 1.0, "*": 1.0}),
    "AGC": lambda: distclip.AGC(0.01),
    "AdaGC": lambda: distclip.AdaGC(max_norm=1.0),
    "Percentile": lambda: distclip.Percentile(initial=1.0),
    "ZClip": lambda: distclip.ZClip(),
    "SkipSpikes": lambda: distclip.SkipSpikes(),
    "Value": lambda: distclip.Value(1.0),
    "Value, direction": lambda: distclip.Value(1.0, measure_direction=True),
    "Chain": lambda: distclip.Chain(distclip.PerParameter(1e3), distclip.GlobalNorm(1.0)),
    "Chain, Value first": lambda: distclip.Chain(distclip.Value(1e3), distclip.GlobalNorm(1.0)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_34_strategies(name: str, size: str) -> None:
    """None takes it for non-finite; what is left is finite, and no more than it was."""
    for policy in ("skip", "raise"):
        ps = make(size)
        before = [g.clone() for g in gradients_of(ps)]
        clipper = distclip.Clipper(ps, STRATEGIES[name](), on_nonfinite=policy)
        report = clipper.clip(param_norms=True)
        assert not report.nonfinite
        for b, a in zip(before, gradients_of(ps), strict=True):
            assert a.isfinite().all()
            assert (a.abs().double() <= b.abs().double() * (1 + 1e-6)).all()
        if name != "SkipSpikes":
            assert not report.skipped
            if norm_of(before, 2) > 1e6:
                assert report.clipped
                assert norm_of(gradients_of(ps), 2) < norm_of(before, 2)
        if name not in ("SkipSpikes", "Value", "Value, direction") and norm_of(before, 2) > 1e6:
            assert norm_of(gradients_of(ps), 2) <= 3.0, "clipped to about 1"
        if report.direction is not None:
            assert report.direction.item() == pytest.approx(1.0, abs=0.1)
    for p in ps.values():
        p.grad = torch.ones_like(p)
    want = norm_of(gradients_of(ps), clipper.strategy.norm_type)
    assert clipper.clip().total_norm.item() == pytest.approx(want)


@pytest.mark.parametrize(
    "size",
    [
        "float32, squares overflow",
        "float32, the largest",
        "float64",
        "float64, squares overflow",
        "complex64, the largest",
    ],
)
def test_34_agc_by_unit(size: str) -> None:
    ps = make(size)
    report = distclip.Clipper(ps, distclip.AGC(0.01)).clip(param_norms=True)
    for p, norm in zip(ps.values(), report.param_norms.values(), strict=True):
        assert p.grad is not None
        want = 0.01 * p.detach().abs().double().reshape(p.shape[0] if p.dim() > 1 else 1, -1).norm(dim=1)
        got = [norm_of([row], 2) for row in p.grad.reshape(len(want), -1)]
        assert got == pytest.approx(want.tolist(), rel=1e-5)
        assert norm.item() > 1e18


class Model(nn.Module):
    """Whose gradients are ``scale``, and of another dtype than its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 5, dtype=dtype))

    def forward(self, scale: float) -> Tensor:
        return (self.weight * scale).sum()


@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("strategy", [distclip.GlobalNorm, distclip.PerParameter])
@pytest.mark.parametrize("size", [s for s in SIZES if not SIZES[s][1].is_complex])
def test_34_in_backward(size: str, strategy: Callable[..., distclip.GlobalNorm], p: float) -> None:
    value, dtype = SIZES[size]
    model = Model(dtype)
    want = norm_of([torch.full((6, 5), value, dtype=dtype)], p)
    bound = 1.0
    stepping = distclip.InBackward(model, lambda p: torch.optim.SGD(p, lr=1.0), strategy(bound, p))
    for _ in range(2):
        with torch.no_grad():
            model.weight.zero_()
        model(value).backward()
        report = stepping.end_step()
        assert not report.nonfinite
        assert not report.skipped
        assert report.total_norm.item() == approx(as_reported(want), dtype)
        moved = norm_of([model.weight.detach()], p)
        if size not in ("float32, subnormal", "bfloat16, small"):
            assert moved == approx(min(want, bound * want / (want + 1e-6)), dtype)
            assert report.clipped_norm.item() == approx(min(want, bound * want / (want + 1e-6)), dtype)


@pytest.mark.parametrize(
    "size",
    [
        "float32, squares overflow",
        "float32, the largest",
        "float64",
        "float64, squares overflow",
        "complex128",
    ],
)
@on_ranks(2)
def test_34_on_ranks(rank: int, size: str) -> None:
    """Sharded, where the sum itself travels: with no collective more, and by hooks."""
    mesh = init_device_mesh("cpu", (2,))
    value, dtype = SIZES[size]
    for p in (2.0, 3.0, math.inf):
        for strategy in (
            distclip.GlobalNorm(1.0, p),
            distclip.PerParameter(1.0, p),
            distclip.AGC(0.01),
            None,
        ):
            whole = nn.Parameter(distribute_tensor(torch.ones(4, 5, dtype=dtype), mesh, [Shard(0)]))
            full = torch.full((4, 5), value, dtype=dtype)
            if strategy is None:
                with distclip.hooks.clip_norm([whole], 1.0, norm_type=p, when="accumulated"):
                    (whole * 1).backward(distribute_tensor(full, mesh, [Shard(0)]))
            else:
                whole.grad = distribute_tensor(full, mesh, [Shard(0)])
                report = distclip.Clipper([whole], strategy).clip()
                assert not report.nonfinite
                if not strategy.per_unit:
                    assert report.total_norm.item() == approx(as_reported(norm_of([full], p)), dtype)
            assert whole.grad is not None
            after = whole.grad.full_tensor()  # type: ignore[attr-defined]
            if strategy is None or not strategy.per_unit:
                assert norm_of([after], p) == approx(1.0, dtype)
            else:
                assert [norm_of([row], 2) for row in after] == [approx(0.01 * 5**0.5, dtype)] * 4


def test_34_what_is_not_finite_still_is() -> None:
    for size in SIZES:
        for bad in (math.inf, math.nan):
            ps = make(size)
            ps["p1"].grad[3] = bad
            assert distclip.Clipper(ps, distclip.GlobalNorm(1.0)).clip().nonfinite
            assert not math.isfinite(distclip.total_grad_norm(ps).item())
