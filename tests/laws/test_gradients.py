"""Any set of gradients that autograd may leave, against a float64 oracle. One process."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from tests import oracle

NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
KINDS = (
    "none", "dense", "transposed", "strided", "expanded", "zero", "sparse", "sparse repeated", "lazy",
    "listed twice", "shared gradient", "frozen",
)  # fmt: skip
EPS = 1e-6

# The autouse `seed` fixture need not run again for each example: they seed themselves.
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Spec:
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int


specs = st.lists(
    st.builds(
        Spec,
        kind=st.sampled_from(KINDS),
        shape=st.lists(st.integers(0, 6), max_size=3).map(tuple),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    ),
    max_size=7,
)


def gradient_of(spec: Spec) -> Tensor:
    generator = torch.Generator().manual_seed(spec.seed)
    dense = torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(spec.dtype)
    if spec.kind == "transposed":
        return dense.mT.contiguous().mT if dense.dim() > 1 else dense
    if spec.kind == "strided":
        return torch.stack([dense, torch.full_like(dense, 99)], dim=-1)[..., 0]
    if spec.kind == "expanded":
        return dense.flatten()[:1].sum().expand(spec.shape)
    if spec.kind == "zero":
        return torch.zeros_like(dense)
    if spec.kind == "lazy":  # backward leaves the first where z.conj() took part
        return dense.conj() if dense.is_complex() else torch._neg_view(dense)
    if spec.kind.startswith("sparse") and dense.dim():
        rows = [0, 0, -1] if spec.kind == "sparse repeated" else range(0, spec.shape[0], 2)
        index = torch.tensor([r % spec.shape[0] for r in rows] if spec.shape[0] else [], dtype=torch.int64)
        return torch.sparse_coo_tensor(index[None], dense[index], spec.shape, check_invariants=True)
    return dense


def build(specs: list[Spec]) -> list[tuple[str, Tensor]]:
    """Named parameters, the same ones each time; "listed twice" and "shared gradient" refer to the last."""
    named: list[tuple[str, Tensor]] = []
    for i, spec in enumerate(specs):
        last = named[-1][1] if named else None
        if spec.kind == "listed twice" and last is not None:
            named.append((f"p{i}", last))
            continue
        if spec.kind == "shared gradient" and last is not None and last.grad is not None:
            parameter = nn.Parameter(torch.zeros_like(last))
            parameter.grad = last.grad
        else:
            parameter = nn.Parameter(torch.zeros(spec.shape, dtype=spec.dtype))
            if spec.kind != "none" and spec.kind != "frozen":
                parameter.grad = gradient_of(spec)
            parameter.requires_grad_(spec.kind != "frozen")
        named.append((f"p{i}", parameter))
    return named


def distinct(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The dense float64 gradients, each once, by the first name that has it."""
    found = {}
    seen: set[int] = set()
    for name, parameter in named:
        gradient = parameter.grad
        if gradient is not None and id(gradient) not in seen:
            seen.add(id(gradient))
            found[name] = oracle.dense(gradient)
    return {name: g for name, g in found.items() if g is not None}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 3e-6)
    atol = 1e-7 if dtype == torch.float16 else 1e-30  # float16 is subnormal below 6e-5
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def agree(named: list[tuple[str, Tensor]], want: dict[str, Tensor]) -> None:
    got = distinct(named)
    assert got.keys() == want.keys()
    tensors = dict(named)
    for name, gradient in got.items():
        close(gradient, want[name], tensors[name].dtype)


@many
@given(specs, st.sampled_from(NORM_TYPES))
def test_total(specs: list[Spec], p: float) -> None:
    named = build(specs)
    want = oracle.norm(distinct(named).values(), p)
    assert distclip.total_grad_norm(named, p).item() == pytest.approx(want, rel=1e-6, abs=1e-40)
    report = distclip.Clipper(named, distclip.GlobalNorm(1.0, p), accumulate=torch.float64).clip()
    assert report.total_norm.item() == pytest.approx(want, rel=2e-7, abs=1e-40)


@many
@given(specs, st.sampled_from(NORM_TYPES), st.floats(0.01, 0.99))
def test_global_norm(specs: list[Spec], p: float, fraction: float) -> None:
    named = build(specs)
    before = distinct(named)
    max_norm = fraction * oracle.norm(before.values(), p)
    coefficient = min(1.0, max_norm / (oracle.norm(before.values(), p) + EPS))
    distclip.clip_grad_norm_(named, max_norm, p)
    agree(named, {name: g * coefficient for name, g in before.items()})


@many
@given(specs, st.sampled_from([0.0, 2**-6, 0.5, 1.0]))
def test_value(specs: list[Spec], bound: float) -> None:
    for clip in (
        lambda named: distclip.clip_grad_value_(named, bound),
        lambda named: distclip.Clipper(named, distclip.Value(bound)).clip(),
    ):
        named = build(specs)
        before = distinct(named)
        clip(named)
        agree(
            named, {name: g * (bound / g.abs().clamp_min(max(bound, 1e-300))) for name, g in before.items()}
        )


@many
@given(specs, st.sampled_from(NORM_TYPES), st.floats(0.05, 3.0))
def test_per_parameter(specs: list[Spec], p: float, max_norm: float) -> None:
    named = build(specs)
    want = {name: g * min(1.0, max_norm / (oracle.norm([g], p) + EPS)) for name, g in distinct(named).items()}
    report = distclip.Clipper(named, distclip.PerParameter(max_norm, norm_type=p)).clip()
    agree(named, want)
    assert set(want) <= set(report.param_norms)


@many
@given(specs, st.floats(0.05, 3.0))
def test_per_group(specs: list[Spec], max_norm: float) -> None:
    """Even names in one group, p1 and p3 in another, the rest in none."""
    named = build(specs)
    before = distinct(named)
    want = dict(before)
    for group in ({"p0", "p2", "p4", "p6"}, {"p1", "p3"}):
        norm = oracle.norm(g for name, g in before.items() if name in group)
        want |= {n: g * min(1.0, max_norm / (norm + EPS)) for n, g in before.items() if n in group}
    # Each pattern has to fit a parameter that trains; of one that is listed twice the first name counts.
    first = {id(p): (name, p) for name, p in reversed(named)}
    trains = [name for name, p in first.values() if p.requires_grad]
    if patterns := [key for key in ("p[0246]", "p[13]") if fnmatch.filter(trains, key)]:
        distclip.Clipper(named, distclip.PerGroup(dict.fromkeys(patterns, max_norm))).clip()
    agree(named, want if patterns else before)


@many
@given(specs)
def test_below_the_threshold(specs: list[Spec]) -> None:
    """Not a bit changes, and .grad stays the very object that it was."""
    named = build(specs)
    gradients, before = [p.grad for _, p in named], distinct(named)
    for strategy in (
        distclip.GlobalNorm(1e6),
        distclip.Value(1e4),
        distclip.PerParameter(1e6),
        distclip.PerGroup({"*": 1e6}),
    ):
        assert not distclip.Clipper(named, strategy).clip().clipped.item()
    distclip.clip_grad_norm_(named, 1e6)
    assert all(p.grad is gradient for (_, p), gradient in zip(named, gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(distinct(named).values(), before.values(), strict=True))
