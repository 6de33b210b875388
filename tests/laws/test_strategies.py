"""The laws of a strategy, over every strategy. A new one is one row of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distclip.decide.decision import Clamp, Decision, Then
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies import (
    AdaGC,
    Chain,
    Cosine,
    GlobalNorm,
    Percentile,
    PerGroup,
    PerParameter,
    SkipSpikes,
    Strategy,
    Value,
    Warmup,
    ZClip,
)
from distclip.testing import check_strategy
from tests.laws.oracles import AdaGCOracle, PercentileOracle, SkipSpikesOracle, ZClipOracle

PARAMETERS = tuple(
    ParameterInfo(name, torch.Size([4, 4]))
    for name in ("embed.weight", "0.weight", "0.bias", "1.weight", "1.bias", "head.weight")
)


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], Strategy]
    memoryless: bool = False
    one_threshold: bool = True  # the report's threshold is the only one

    def new(self) -> Strategy:
        strategy = self.make()
        strategy.prepare(PARAMETERS)
        return strategy


ROWS = [
    Row("global", lambda: GlobalNorm(1.0), memoryless=True),
    Row("global, p = ∞", lambda: GlobalNorm(0.5, norm_type=math.inf), memoryless=True),
    Row("global, warmup", lambda: GlobalNorm(Warmup(0.1, 2.0, steps=9))),
    Row("value", lambda: Value(0.3), memoryless=True),
    Row("value, cosine", lambda: Value(Cosine(1.0, 0.1, steps=9))),
    Row("per parameter", lambda: PerParameter(0.5), memoryless=True),
    Row("per parameter, warmup", lambda: PerParameter(Warmup(1.0, 0.1, steps=9))),
    Row("per group", lambda: PerGroup({"*.bias": 0.2, "embed.*": 0.5}), memoryless=True),
    Row("percentile", lambda: Percentile(80, multiplier=1.2, history=8, warmup=4, initial=2.0)),
    Row("autoclip", lambda: Percentile(10, multiplier=1, warmup=1, history=None)),
    Row("zclip", lambda: ZClip(warmup=5, max_norm=3.0)),
    Row("adagc", lambda: AdaGC(warmup=4)),
    Row("skip spikes", lambda: SkipSpikes(window=8, sigma=3.0, min_history=5)),
    Row("skip spikes, loss", lambda: SkipSpikes(window=8, sigma=3.0, min_history=5, use_loss=True)),
    Row(
        "chain, value in the middle",
        lambda: Chain(GlobalNorm(0.5), Value(0.2), GlobalNorm(0.3)),
        one_threshold=False,
    ),
    Row("chain, value first", lambda: Chain(Value(0.2), ZClip(warmup=5, max_norm=3.0), GlobalNorm(0.3))),
    Row(
        "chain, skips twice",
        lambda: Chain(
            SkipSpikes(8, 3.0, min_history=5, patience=3), SkipSpikes(8, 4.0, min_history=6, patience=8)
        ),
    ),
    Row("chain, global", lambda: Chain(SkipSpikes(8, 3.0, min_history=5), ZClip(warmup=5), GlobalNorm(0.7))),
    Row(
        "chain, value last",
        lambda: Chain(Percentile(50, history=8, warmup=4), Value(0.2)),
        one_threshold=False,
    ),
    Row(
        "chain, mixed",
        lambda: Chain(PerGroup({"*.bias": 0.2}), PerParameter(0.5), GlobalNorm(0.9)),
        memoryless=True,
        one_threshold=False,
    ),
    Row(
        "chain, mixed adaptive",
        lambda: Chain(
            SkipSpikes(8, 3.0, min_history=5), AdaGC(warmup=4), PerGroup({"0.*": 0.5}), ZClip(warmup=3)
        ),
        one_threshold=False,
    ),
]
every_strategy = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
a_few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture only seeds torch, which draws nothing here


@st.composite
def histories(draw: st.DrawFn, bad: bool = True) -> list[np.ndarray]:
    """Steps of one norm per parameter, of all the kinds that training brings."""
    kinds = [
        "usual",
        "usual",
        "usual",
        "spike",
        "one spike",
        "zero",
        "tiny",
        *(["nan", "inf"] if bad else []),
    ]
    steps = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=30))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [_step(kind, random) for kind in steps]


def _step(kind: str, random: np.random.Generator) -> np.ndarray:
    norms = random.lognormal(-1.5, 0.3, len(PARAMETERS))
    one = random.integers(len(PARAMETERS))
    if kind in ("spike", "tiny", "zero"):
        norms *= {"spike": 30.0, "tiny": 1e-9, "zero": 0.0}[kind]
    elif kind != "usual":
        norms[one] *= {"one spike": 1e4, "nan": math.nan, "inf": math.inf}[kind]
    return norms


def norms_for(strategy: Strategy, parts: np.ndarray) -> Norms:
    """What the clipper would hand to the strategy."""
    p = strategy.norm_type
    if strategy.per_parameter:
        labels, of = tuple(i.name for i in PARAMETERS), list(range(len(PARAMETERS)))
    else:
        labels, of = strategy.groups, [strategy.group_of(i) for i in PARAMETERS]
    sums = torch.zeros(len(labels), dtype=torch.float64)
    for slot, part in zip(of, parts, strict=True):
        sums[slot] = max(sums[slot].item(), part) if math.isinf(p) else sums[slot] + part**p
        if math.isinf(p) and math.isnan(part):
            sums[slot] = math.inf  # as the reduction sends it
    measured = Norms.from_power_sums(sums, p, labels)
    if strategy.num_extra:  # of gradients of one element
        extra = [strategy.elementwise(torch.tensor([part])) for part in parts]
        measured = replace(measured, extra=torch.stack(extra).sum(0))
    if strategy.measures_again:

        def clamped(coefficients: Tensor, bound: Tensor) -> Tensor:
            sizes = torch.from_numpy(parts) * coefficients
            return torch.stack([sizes.clamp(max=bound.double()).pow(p).sum(), (sizes > bound).sum().double()])

        measured = replace(measured, clamped=clamped)
    return measured


def skips(decision: Decision) -> bool:
    return decision.skip is not None and bool(decision.skip)


def coefficients(decision: Decision) -> Tensor:
    if isinstance(decision, Clamp):
        return torch.ones(())
    return decision.first.coefficient if isinstance(decision, Then) else decision.coefficient


@every_strategy
@pytest.mark.parametrize("seed", [0, 1])
def test_every_law(row: Row, seed: int) -> None:
    steps = 20 if row.name != "autoclip" else 10  # which sorts 65,536 numbers in each
    check_strategy(
        row.make, seed=seed, steps=steps, memoryless=row.memoryless, one_threshold=row.one_threshold
    )


@every_strategy
def test_quiet_steps_are_left_alone_and_loud_ones_are_not(row: Row) -> None:
    """That the laws here are not about nothing."""
    strategy = row.new()
    quiet, loud = np.full(len(PARAMETERS), 0.01), np.full(len(PARAMETERS), 1e4)
    for i in range(12):
        decision = strategy.decide(norms_for(strategy, quiet * (1 - i / 100)))
        assert (coefficients(decision) == 1).all() or row.name == "autoclip"
    decision = strategy.decide(norms_for(strategy, loud))
    if isinstance(decision, Clamp):
        assert decision.bound < 1e4
    else:
        assert skips(decision) or (coefficients(decision) < 1).any()


# The adaptive ones against brute force.


def total(parts: np.ndarray) -> float:
    return float(np.float32(np.sqrt((parts**2).sum())))


@a_few
@given(
    history=histories(bad=False), q=st.sampled_from([0.0, 10.0, 50.0, 95.0, 100.0]), size=st.integers(1, 9)
)
def test_percentile_against_brute_force(history: Sequence[np.ndarray], q: float, size: int) -> None:
    settings = {"multiplier": 1.3, "history": size, "warmup": min(size, 3), "initial": 0.9}
    strategy, oracle = Percentile(q, **settings), PercentileOracle(q, **settings)
    for parts in history:
        n = total(parts)
        decision = strategy.decide(norms_for(strategy, parts))
        threshold = oracle.threshold(n)
        assert decision.threshold.item() == pytest.approx(threshold, rel=1e-6)
        expected = 1.0 if n <= threshold else threshold / (n + min(1e-6, n / 1000))
        assert coefficients(decision).item() == pytest.approx(expected, rel=1e-5)


@a_few
@given(history=histories(bad=False), window=st.integers(2, 9), sigma=st.sampled_from([0.5, 2.0, 6.0]))
def test_skip_spikes_against_brute_force(history: Sequence[np.ndarray], window: int, sigma: float) -> None:
    strategy = SkipSpikes(window, sigma, min_history=3, patience=4)
    oracle = SkipSpikesOracle(window, sigma, min_history=3, patience=4)
    for parts in history:
        decision = strategy.decide(norms_for(strategy, parts))
        assert skips(decision) == oracle.skips(total(parts))


@a_few
@given(history=histories(bad=False), max_norm=st.sampled_from([0.6, 5.0, math.inf]), warmup=st.integers(1, 6))
def test_zclip_against_brute_force(history: Sequence[np.ndarray], max_norm: float, warmup: int) -> None:
    strategy = ZClip(0.9, 2.0, max_norm, warmup=warmup, eps=1e-5, patience=3)
    oracle = ZClipOracle(0.9, 2.0, max_norm, warmup=warmup, eps=1e-5, patience=3)
    for parts in history:
        decision = strategy.decide(norms_for(strategy, parts))
        expected = oracle.coefficient(total(parts))
        assert coefficients(decision).item() == pytest.approx(expected, rel=1e-5)
        if expected < 1:
            assert decision.threshold.item() == pytest.approx(expected * (total(parts) + 1e-5), rel=1e-5)


@a_few
@given(history=histories(bad=False), warmup=st.integers(0, 5))
def test_adagc_against_brute_force(history: Sequence[np.ndarray], warmup: int) -> None:
    arguments = {"ratio": 1.1, "beta": 0.8, "eps": 1e-6, "warmup": warmup, "max_norm": 0.8}
    strategy, oracle = AdaGC(**arguments), AdaGCOracle(**arguments)
    strategy.prepare(PARAMETERS)
    for parts in history:
        parts = np.where(np.arange(len(parts)) == 3, 0.0, parts) if len(history) % 2 else parts
        parts = parts.astype(np.float32).astype(np.float64)
        decision = strategy.decide(norms_for(strategy, parts))
        expected = oracle.coefficients(list(parts))
        np.testing.assert_allclose(coefficients(decision).expand(len(parts)).numpy(), expected, rtol=1e-5)
