"""The laws of DESIGN.md over every row of the placement table."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.layout.declarations import Declared, add_to_parameter
from distclip.layout.parameters import NamedParameter
from distclip.layout.placement import MANAGED, SUMMED
from tests import oracle
from tests.counting import count_host_syncs, unordered_sums
from tests.harness import on_row
from tests.layouts import LAYOUTS, Case

NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf)
EPS = 1e-6


def built(row: str, seed: int = 3) -> Case:
    case = LAYOUTS[row].build()
    case.backward(seed)
    return case


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def bits(case: Case) -> list[Tensor | None]:
    """Every local gradient, as it is."""
    return [None if p.grad is None else local(p.grad).clone() for p in case.tensors]


def assert_same_bits(a: list[Tensor | None], b: list[Tensor | None]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert torch.equal(x, y)


# What each strategy should make of dense float64 gradients, by name.
Expected = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def scaled(grads: dict[str, Tensor], max_norm: float, p: float) -> dict[str, Tensor]:
    coefficient = min(1.0, max_norm / (oracle.norm(grads.values(), p) + EPS))
    return {name: g * coefficient for name, g in grads.items()}


def clamped(grads: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    return {name: g * (bound / g.abs().clamp_min(bound)) for name, g in grads.items()}


def bare(name: str) -> str:
    """The name of a parameter as a strategy sees it: within its own pipeline stage, without wrappers."""
    name = name.replace("_fsdp_wrapped_module.", "")
    return name.split(".", 1)[1] if name.startswith("stage") else name


def strategies(grads: dict[str, Tensor]) -> dict[str, tuple[distclip.Strategy, Expected]]:
    """Every strategy with thresholds that clip, and what it should do."""
    total = {p: oracle.norm(grads.values(), p) for p in NORM_TYPES}
    middle = sorted(oracle.norm([g]) for g in grads.values())[len(grads) // 2]
    bound = 0.4 * total[math.inf]
    chosen = bare(next(reversed(grads)))
    group = {n: g for n, g in grads.items() if bare(n) == chosen}
    rest = {n: g for n, g in grads.items() if n not in group}
    table: dict[str, tuple[distclip.Strategy, Expected]] = {
        f"GlobalNorm p={p}": (
            distclip.GlobalNorm(0.3 * total[p], p),
            lambda g, p=p: scaled(g, 0.3 * total[p], p),
        )
        for p in NORM_TYPES
    }
    table["Value"] = (distclip.Value(bound), lambda g: clamped(g, bound))
    for p in (1.0, 2.0):
        most = 0.3 * oracle.norm(clamped(grads, bound).values(), p)
        table[f"Chain, Value first, p={p}"] = (
            distclip.Chain(distclip.Value(bound), distclip.GlobalNorm(most, p)),
            lambda g, p=p, most=most: scaled(clamped(g, bound), most, p),
        )
    table["PerParameter"] = (
        distclip.PerParameter(middle),
        lambda g: {n: scaled({n: x}, middle, 2)[n] for n, x in g.items()},
    )
    table["PerGroup"] = (
        distclip.PerGroup({chosen: 0.1, "*": 0.3 * total[2.0]}),
        lambda g: {**scaled(group, 0.1, 2), **scaled(rest, 0.3 * total[2.0], 2)},
    )
    return table


def tolerance(tensor: Tensor) -> float:
    return {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(tensor.dtype, 3e-6)


@on_row(LAYOUTS)
def test_one_norm(row: str) -> list[float]:
    """Law 1, and law 2's count."""
    case = built(row)
    gradients = case.dense().values()
    norms = []
    for p in NORM_TYPES:
        for _ in range(2):  # makes the plan, sums what is Partial; compares copies again in the second call
            distclip.total_grad_norm(case.parameters, p, **case.kwargs)
        case.backward(3)
        with CommDebugMode() as comm:
            total = distclip.total_grad_norm(case.parameters, p, **case.kwargs)
        assert type(total) is Tensor
        assert total.dtype == torch.float32
        assert total.dim() == 0
        want = oracle.norm(gradients, p)
        assert total.item() == pytest.approx(want, rel=1e-6), (p, want)
        # Which collectives: the backward pass of the row is outside.
        assert comm.get_total_counts() == LAYOUTS[row].collectives, (p, comm.get_comm_counts())
        norms.append(total.item())
    return norms  # compared bit for bit between ranks by the harness


@on_row(LAYOUTS)
def test_strategies_equal_their_dense_result(row: str) -> list[str]:
    """Laws 1, 2, 3 and 10: each strategy, on every placement, does what it does to dense gradients."""
    case = built(row)
    before = case.dense()
    reports = []
    for label, (strategy, expected) in strategies(before).items():
        case.backward(3)
        want = expected(before)
        clipper = distclip.Clipper(case.parameters, strategy, **case.kwargs)
        assert clipper.plan is not None  # made outside the count
        with CommDebugMode() as comm, count_host_syncs() as syncs, unordered_sums() as unordered:
            report = clipper.clip()
        assert unordered.seen == [], label
        assert comm.get_total_counts() == LAYOUTS[row].collectives, label
        assert syncs.count <= 1, label  # on the CPU one look at whether anything is clipped
        after = case.dense()
        assert after.keys() == want.keys()
        for name, got in after.items():
            parameter = case.named.get(name, case.tensors[0])
            close = torch.allclose(got, want[name], rtol=tolerance(parameter), atol=1e-9)
            assert close, (label, name, got, want[name])
        assert report.clipped.item(), label
        reports.append(f"{label} {report}")
        clipped_norm = oracle.norm(case.dense().values(), strategy.norm_type)
        low_precision = any(p.dtype in (torch.bfloat16, torch.float16) for p in case.tensors)
        assert report.clipped_norm.item() == pytest.approx(
            clipped_norm, rel=1e-2 if low_precision else 1e-5
        ), label
    return reports


GROUPS = {"*.weight": 0.1, "*": 0.2}


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    "make",
    [
        distclip.GlobalNorm,
        lambda _, p: distclip.PerGroup(GROUPS, norm_type=p),
        distclip.PerParameter,
        lambda _, p: distclip.Chain(distclip.PerGroup(GROUPS, norm_type=p), distclip.PerParameter(0.1, p)),
        lambda *_: distclip.AGC(),
    ],
    ids=["GlobalNorm", "PerGroup", "PerParameter", "Chain", "AGC"],
)
def test_replicas_add_in_the_same_order(
    make: Callable[[float, float], distclip.Strategy], norm_type: float
) -> None:
    """Law 2, where nothing is reduced over the ranks that could make them agree."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    clipper = distclip.Clipper(model, make(0.1, norm_type))
    for parameter in reversed(list(model.parameters())):  # not a run
        parameter.grad = torch.randn(parameter.shape)
    _ = clipper.plan
    with unordered_sums() as unordered:
        clipper.clip()
        clipper.clip(param_norms=True)
    assert unordered.seen == []


@on_row(LAYOUTS)
def test_below_the_threshold_nothing_changes(row: str) -> None:
    """Law 6."""
    case = built(row)
    distclip.total_grad_norm(
        case.parameters, **case.kwargs
    )  # Partial gradients are summed by any measurement
    before = bits(case)
    for strategy in (
        distclip.GlobalNorm(1e4),
        distclip.Value(1e4),
        distclip.PerParameter(1e4),
        distclip.PerGroup({"*": 1e4}),
    ):
        report = distclip.Clipper(case.parameters, strategy, **case.kwargs).clip()
        assert not report.clipped.item()
        assert report.coefficient.item() == 1.0
        assert_same_bits(bits(case), before)


@on_row(LAYOUTS)
def test_twice_is_once(row: str) -> None:
    """Law 6."""
    case = built(row)
    max_norm = 0.5 * oracle.norm(case.dense().values())
    distclip.clip_grad_norm_(case.parameters, max_norm, **case.kwargs)
    once = case.dense()
    distclip.clip_grad_norm_(case.parameters, max_norm, **case.kwargs)
    for name, twice in case.dense().items():
        parameter = case.named.get(name, case.tensors[0])
        torch.testing.assert_close(twice, once[name], rtol=tolerance(parameter), atol=0)


@on_row({name: row for name, row in LAYOUTS.items() if row.collectives})
def test_missing_gradients(row: str) -> list[float]:
    """Law 2: a gradient that only one rank lacks, and a step without any, still join."""
    case = built(row)
    for p in NORM_TYPES:
        distclip.total_grad_norm(case.parameters, p, **case.kwargs)  # makes the plan
    case.backward(3)
    if dist.get_rank() in LAYOUTS[row].replicas_of_rank_1:
        for tensor in case.tensors[:2]:
            tensor.grad = None
    norms = [distclip.total_grad_norm(case.parameters, p, **case.kwargs).item() for p in NORM_TYPES]
    assert all(0 < n < math.inf for n in norms)
    for tensor in case.tensors:
        tensor.grad = None
    with CommDebugMode() as comm:
        assert distclip.total_grad_norm(case.parameters, **case.kwargs).item() == 0.0
    assert 1 <= comm.get_total_counts() <= LAYOUTS[row].collectives
    assert all(tensor.grad is None for tensor in case.tensors)
    return norms


@on_row(LAYOUTS)
def test_nonfinite_is_decided_together_and_first(row: str) -> None:
    """Laws 4 and 5: one bad element, on one rank; every policy decides alike on all."""
    for bad in (math.nan, math.inf):
        for p in (2.0, math.inf):
            case = built(row)
            distclip.total_grad_norm(case.parameters, **case.kwargs)
            if LAYOUTS[row].same_everywhere or dist.get_rank() in LAYOUTS[row].replicas_of_rank_1:
                gradient = next(local(t.grad) for t in case.tensors if local(t.grad).numel())  # type: ignore[arg-type]
                gradient.view(-1)[0] = bad
            before = bits(case)
            with pytest.raises(distclip.NonFiniteError, match="cannot be clipped"):
                distclip.clip_grad_norm_(case.parameters, 1.0, p, error_if_nonfinite=True, **case.kwargs)
            _assert_equal_with_nan(bits(case), before)

            report = distclip.Clipper(case.parameters, distclip.GlobalNorm(1.0, p), **case.kwargs).clip()
            assert report.nonfinite.item()
            assert report.skipped.item()
            assert not report.clipped.item()
            _assert_equal_with_nan(bits(case), before)

            report = distclip.Clipper(
                case.parameters, distclip.GlobalNorm(1.0, p), on_nonfinite="zero", **case.kwargs
            ).clip()
            assert report.nonfinite.item()
            assert not report.skipped.item()
            assert all(not g.any() for g in bits(case) if g is not None)


def _assert_equal_with_nan(a: list[Tensor | None], b: list[Tensor | None]) -> None:
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            assert torch.equal(x.nan_to_num(nan=7e4), y.nan_to_num(nan=7e4))


@on_row({name: LAYOUTS[name] for name in ("single", "ddp", "ddp_bucket_view")})
def test_drop_in(row: str) -> None:
    """Law 7: values, returned norm and argument order of torch, where torch is right."""
    for p in NORM_TYPES:
        for max_norm in (0.1, 1e4):
            mine, theirs = built(row), built(row)
            n = distclip.clip_grad_norm_(mine.tensors, max_norm, p, False, None)
            m = torch.nn.utils.clip_grad_norm_(theirs.tensors, max_norm, p, False, None)
            assert n.item() == pytest.approx(m.item(), rel=1e-6)
            for a, b in zip(mine.tensors, theirs.tensors, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    mine, theirs = built(row), built(row)
    distclip.clip_grad_value_(mine.tensors, 0.05, None)
    torch.nn.utils.clip_grad_value_(theirs.tensors, 0.05, None)
    assert_same_bits(bits(mine), bits(theirs))
    assert max(g.abs().max() for g in bits(mine) if g is not None).item() == pytest.approx(0.05)


@on_row(LAYOUTS)
def test_duplicates_count_once(row: str) -> None:
    """Law 10: listed twice, and two parameters that share one gradient."""
    case = built(row)
    want = oracle.norm(case.dense().values())
    for _ in range(2):
        total = distclip.total_grad_norm(case.parameters, **case.kwargs)  # FSDP1 marks its parameters
        assert total.item() == pytest.approx(want, rel=1e-6)
    total = distclip.clip_grad_norm_([*case.tensors, *case.tensors], 0.5 * want, **case.kwargs)
    assert total.item() == pytest.approx(want, rel=1e-6)
    got = oracle.norm(case.dense().values())
    assert got == pytest.approx(0.5 * want, rel=1e-2)

    case.backward(3)
    distclip.total_grad_norm(case.parameters, **case.kwargs)  # where Partial gradients are summed
    first = case.tensors[0]
    twin = torch.nn.Parameter(first.detach().clone())
    twin.grad = first.grad
    for attribute in (MANAGED, SUMMED):
        if hasattr(first, attribute):
            setattr(twin, attribute, getattr(first, attribute))
    if (declared := Declared([NamedParameter("", first)]).of.get(id(first))) is not None:
        add_to_parameter(twin, declared)
    total = distclip.clip_grad_norm_([*case.tensors, twin], 0.5 * want, **case.kwargs)
    assert total.item() == pytest.approx(want, rel=1e-6)
    assert oracle.norm(case.dense().values()) == pytest.approx(0.5 * want, rel=1e-2)
