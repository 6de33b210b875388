from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from distclip.decide.decision import Clamp, Decision, Scale, Then
from distclip.decide.norms import Norms, combine
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies import (
    Chain,
    GlobalNorm,
    PerGroup,
    PerParameter,
    SkipSpikes,
    Strategy,
    Value,
    Warmup,
    ZClip,
)

PARAMETERS = [ParameterInfo(name, torch.Size([3])) for name in ("a.weight", "a.bias", "b.weight", "b.bias")]


def norms(gradients: list[Tensor], p: float, fine: bool) -> Norms:
    slots = torch.stack([torch.linalg.vector_norm(g.double(), p) for g in gradients]).float()
    total = combine(slots, p)
    return Norms(total, slots if fine else total.view(1), p)


def one_after_the_other(links: list[Strategy], gradients: list[Tensor]) -> list[Tensor]:
    """What a chain means: every link measures anew what the ones before it left, in float64."""
    gradients = [g.double() for g in gradients]
    for link in links:
        parts = norms(gradients, link.norm_type, fine=True)
        of = [0] * len(gradients) if len(link.groups) == 1 else [link.group_of(p) for p in PARAMETERS]
        slots = parts.slots
        if not link.per_parameter:
            members = [[i for i, g in enumerate(of) if g == group] for group in range(len(link.groups))]
            slots = torch.stack([combine(parts.slots[m], link.norm_type) for m in members])
        decision = link.decide(Norms(parts.total, slots, link.norm_type))
        if isinstance(decision, Clamp):
            gradients = [g.clamp(-decision.bound.item(), decision.bound.item()) for g in gradients]
        else:
            assert isinstance(decision, Scale)
            c = decision.coefficient.expand(len(slots))
            gradients = [g * c[i if link.per_parameter else of[i]] for i, g in enumerate(gradients)]
    return gradients


def clamped(gradients: list[Tensor], p: float, coefficients: Tensor, bound: Tensor) -> Tensor:
    """What ``Norms.clamped`` measures."""
    each = coefficients.expand(len(gradients))
    sizes = torch.cat([g.double().abs() * c for g, c in zip(gradients, each, strict=True)])
    return torch.stack([sizes.clamp(max=bound.double()).pow(p).sum(), (sizes > bound).sum().double()])


def carried_out(decision: Decision, gradients: list[Tensor]) -> list[Tensor]:
    if isinstance(decision, Then):
        return carried_out(decision.second, carried_out(decision.first, gradients))
    if isinstance(decision, Clamp):
        return [g.clamp(-decision.bound.item(), decision.bound.item()) for g in gradients]
    return [g * c for g, c in zip(gradients, decision.coefficient.expand(len(gradients)), strict=True)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [GlobalNorm(2.0), GlobalNorm(1.0)],
        lambda: [ZClip(warmup=3), GlobalNorm(0.5)],
        lambda: [PerParameter(1.0), GlobalNorm(1.2)],
        lambda: [GlobalNorm(1.5), PerParameter(0.5)],
        lambda: [PerGroup({"*.bias": 0.4, "b.*": 0.7}), GlobalNorm(0.8)],
        lambda: [PerParameter(0.9), PerGroup({"*.bias": 0.4, "b.*": 0.7}), ZClip(warmup=3)],
        lambda: [PerGroup({"*": 1.0}, norm_type=1), PerGroup({"a.*": 1.5, "*.bias": 1.0}, norm_type=1)],
        lambda: [GlobalNorm(1.0), Value(0.3)],
        lambda: [PerGroup({"*.bias": 0.4}), PerParameter(0.6), Value(0.3)],
        lambda: [Value(0.9), GlobalNorm(0.5, norm_type=math.inf)],
        lambda: [PerGroup({"a.*": 0.7}, norm_type="inf"), Value(0.5), GlobalNorm(0.3, norm_type="inf")],
        lambda: [Value(0.9), GlobalNorm(Warmup(2.0, 0.2, 5), norm_type=math.inf), Value(0.6)],
        lambda: [GlobalNorm(5.0)],
        lambda: [Value(0.5), Value(0.2)],
        lambda: [GlobalNorm(1.0), Value(0.3), Value(0.2)],
        lambda: [Value(0.3), GlobalNorm(0.5)],
        lambda: [Value(Warmup(1.0, 0.1, 5)), GlobalNorm(0.5, norm_type=1)],
        lambda: [Value(0.3), GlobalNorm(0.5, norm_type=3), GlobalNorm(0.4, norm_type=3)],
        lambda: [Value(0.5), Value(0.2), ZClip(warmup=3), Value(0.05)],
        lambda: [Value(math.inf), GlobalNorm(0.5)],
        lambda: [Value(0.5), SkipSpikes(8, 1e9, min_history=3), Value(0.3), GlobalNorm(0.4), Value(0.2)],
        lambda: [GlobalNorm(1.0), Value(0.3), GlobalNorm(0.4)],
        lambda: [PerParameter(1.0), Value(0.3), GlobalNorm(0.4)],
        lambda: [PerGroup({"*.bias": 0.4, "b.*": 0.7}), Value(0.3), ZClip(warmup=3), Value(0.2)],
        lambda: [
            Value(0.9),
            GlobalNorm(1.0),
            Value(0.2),
            Value(0.3),
            GlobalNorm(0.4),
            Value(0.1),
            ZClip(warmup=3),
        ],
        lambda: [GlobalNorm(1.0, norm_type=1), Value(Warmup(1.0, 0.1, 5)), GlobalNorm(0.4, norm_type=1)],
        lambda: [GlobalNorm(1.0, norm_type=3), Value(math.inf), GlobalNorm(0.4, norm_type=3)],
    ],
)
def test_a_chain_is_its_links_one_after_the_other(make) -> None:  # type: ignore[no-untyped-def]
    chain, links = Chain(*make()), make()
    chain.prepare(PARAMETERS)
    changed = 0
    for _ in range(12):
        gradients = [torch.randn(3) * 10 ** torch.randn(()) for _ in PARAMETERS]
        measured = norms(gradients, chain.norm_type, chain.per_parameter)
        if chain.num_extra:
            measured = replace(measured, extra=torch.stack([chain.elementwise(g) for g in gradients]).sum(0))
        if chain.measures_again:
            measured = replace(measured, clamped=partial(clamped, gradients, chain.norm_type))
        decision = chain.decide(measured)
        ours = carried_out(decision, gradients)
        expected = one_after_the_other(links, gradients)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=0.0)
        changed += not all(torch.equal(a, b) for a, b in zip(ours, gradients, strict=True))
    assert changed > 3


def test_only_a_chain_that_has_to_asks_for_one_norm_per_parameter() -> None:
    assert not Chain(SkipSpikes(), GlobalNorm(1.0), Value(0.1)).per_parameter
    assert Chain(GlobalNorm(1.0), PerParameter(1.0)).per_parameter
    assert Chain(PerGroup({"*": 1.0}), Value(1.0)).per_parameter


def test_one_link_skips_for_all_and_none_remembers() -> None:
    chain = Chain(
        ZClip(max_norm=math.inf), SkipSpikes(4, 3.0, min_history=3), GlobalNorm(Warmup(1.0, 2.0, 10))
    )
    for n in (1.0, 1.1, 0.9):
        chain.decide(norms([torch.tensor([n])], 2.0, fine=False))
    before = {name: b.clone() for name, b in chain.named_buffers()}
    decision = chain.decide(norms([torch.tensor([1e3])], 2.0, fine=False))
    assert decision.skip
    changed = {name for name, b in chain.named_buffers() if not torch.equal(b, before[name])}
    assert changed == {"links.1.skips"}  # which counts them


@pytest.mark.parametrize("sigmas", [(3.0, 1e9), (1e9, 3.0)])
def test_any_link_may_skip(sigmas: tuple[float, float]) -> None:
    chain = Chain(*(SkipSpikes(4, sigma, min_history=3) for sigma in sigmas))
    for n in (1.0, 1.1, 0.9):
        assert not chain.decide(norms([torch.tensor([n])], 2.0, fine=False)).skip
    assert chain.decide(norms([torch.tensor([1e3])], 2.0, fine=False)).skip


def test_a_link_that_skips_after_one_that_clips_sees_the_clipped_norm() -> None:
    chain = Chain(GlobalNorm(1.0), SkipSpikes(4, 3.0, min_history=3))
    for n in (1.0, 1.1, 0.9, 1e3):
        assert not chain.decide(norms([torch.tensor([n])], 2.0, fine=False)).skip


def test_what_is_not_clipped_keeps_its_norm_to_the_last_bit() -> None:
    class Sees(Strategy):
        def forward(self, seen: Norms) -> Decision:
            self.total = seen.total
            return Scale(torch.ones(()), torch.ones(()))

    sees = Sees()
    chain = Chain(PerParameter(1e9), sees)
    slots = torch.rand(1000)
    total = combine(slots, 2.0) * (1 + 1e-6)  # as the reduction rounds it, not as the slots add up
    chain.decide(Norms(total, slots))
    assert sees.total == total


def test_the_threshold_is_the_smallest_of_those_on_the_whole() -> None:
    slots = torch.tensor([3.0, 4.0, 0.0, 0.0])
    one = Norms(torch.tensor(5.0), slots)
    assert Chain(SkipSpikes(), GlobalNorm(2.0), GlobalNorm(3.0)).decide(one).threshold == 2
    chain = Chain(PerParameter(0.5), GlobalNorm(2.0), Value(0.1))
    assert chain.decide(one).threshold == 2
    chain = Chain(PerParameter(0.5), PerGroup({"*.bias": 0.3}))
    chain.prepare(PARAMETERS)
    assert chain.decide(one).threshold.tolist() == pytest.approx([0.5, 0.3, 0.5, 0.3])


def test_a_chain_in_a_chain_counts_as_its_links() -> None:
    inner = Chain(GlobalNorm(2.0), PerParameter(1.0))
    assert [type(link) for link in Chain(inner, Value(1.0)).each()] == [GlobalNorm, PerParameter, Value]


shared = GlobalNorm(1.0)


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([], "of nothing"),
        ([Value(1.0), PerParameter(1.0)], "put Value last"),
        ([Value(1.0), PerParameter(1.0, norm_type=math.inf)], "put Value last"),
        ([GlobalNorm(1.0), GlobalNorm(1.0, norm_type=1)], "norm types 1, 2"),
        ([shared, shared], "occurs twice"),
        ([Chain(shared), shared], "occurs twice"),
    ],
)
def test_chains_that_cannot_be(links: list[Strategy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain(*links)


def test_a_link_that_is_no_strategy() -> None:
    with pytest.raises(TypeError, match=r"1\.0: expected a distclip.Strategy"):
        Chain(1.0)  # type: ignore[arg-type]


def test_a_strategy_of_the_users_own_that_clamps_stands_last_too() -> None:
    class Own(Strategy):
        def forward(self, norms: Norms) -> Decision:
            return Clamp(torch.tensor(1.0))

    one = Norms(torch.tensor(5.0), torch.tensor([5.0]))
    assert isinstance(Chain(GlobalNorm(1.0), Own()).decide(one), Then)
    with pytest.raises(ValueError, match="put it last"):
        Chain(Own(), GlobalNorm(1.0)).decide(one)
