"""``distclip.testing.check_strategy``: good strategies pass, and each bad one breaks the law it breaks."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from distclip import Decision, Norms, Scale, Strategy
from distclip.testing import LAWS, LawBroken, check_strategy

STEPS = 30


class MovingAverage(Strategy):
    """Clip to twice the running mean of the norm."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, norms: Norms) -> Decision:
        threshold = torch.where(self.mean > 0, 2 * self.mean, norms.total)
        coefficient = torch.where(norms.total > threshold, threshold / norms.total, 1.0)
        self.mean.lerp_(norms.total * coefficient, 0.1)
        return Scale(coefficient, threshold)


BAD: list[tuple[str, Callable[..., Any]]] = []


def breaks(law: str, **arguments: Any) -> Callable[[type[Strategy]], type[Strategy]]:
    def register(bad: type[Strategy]) -> type[Strategy]:
        BAD.append(pytest.param(law, bad, arguments, id=bad.__name__))  # type: ignore[arg-type]
        return bad

    return register


def clipped_to(norm: Tensor, threshold: Tensor) -> Scale:
    return Scale(torch.where(norm > threshold, threshold / norm, 1.0), threshold)


def at_one(norms: Norms) -> Scale:
    return clipped_to(norms.total, torch.ones_like(norms.total))


@breaks("no host sync")
class AsksTheHost(Strategy):
    def forward(self, norms: Norms) -> Decision:
        if norms.total > 1:
            return Scale(1 / norms.total, torch.ones_like(norms.total))
        return Scale(torch.ones_like(norms.total), torch.ones_like(norms.total))


@breaks("no host sync")
class CountsAMask(Strategy):
    def forward(self, norms: Norms) -> Decision:
        finite = norms.slots[norms.slots < 1]  # its length is only known on the device
        return clipped_to(norms.total, finite.sum().clamp(min=1.0))


@breaks("no host sync")
class UsesNumpy(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return clipped_to(norms.total, torch.full_like(norms.total, norms.slots.numpy().max(initial=1.0)))


@breaks("deterministic")
class Rolls(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return clipped_to(norms.total, torch.rand(()) + 0.5)


@breaks("deterministic")
class RollsInPython(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return clipped_to(norms.total, torch.tensor(random.uniform(0.5, 1.5)))


@breaks("deterministic")
class KnowsItsRank(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return clipped_to(norms.total, torch.tensor(1.0 + int(os.environ.get("RANK", 0))))


@breaks("deterministic")
class SharesItsState(Strategy):
    seen: list[Tensor] = []  # noqa: RUF012  # the mistake

    def forward(self, norms: Norms) -> Decision:
        self.seen.append(norms.total)
        return clipped_to(norms.total, torch.stack(self.seen).nan_to_num(posinf=0.0).mean())


@breaks("state_dict")
class CountsInPython(Strategy):
    steps = 0

    def forward(self, norms: Norms) -> Decision:
        self.steps += 1
        return clipped_to(norms.total, torch.tensor(1.0 / self.steps))


@breaks("state_dict")
class DoesNotSaveItsState(MovingAverage):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0), persistent=False)


@breaks("state_dict")
class SavesWhatCannotBeRead(MovingAverage):
    def get_extra_state(self) -> Any:
        return LawBroken  # a class: no plain data

    def set_extra_state(self, state: Any) -> None:
        pass


@breaks("no trace")
class LearnsFromBadSteps(MovingAverage):
    def decide(self, norms: Norms) -> Decision:
        with torch.no_grad():
            return self.forward(norms)  # nothing is rolled back


@breaks("no trace")
class LearnsFromBadStepsInPython(Strategy):
    """Saved, but not rolled back."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.tensor(1.0)

    def forward(self, norms: Norms) -> Decision:
        decision = clipped_to(norms.total, self.mean)
        self.mean = self.mean.lerp(norms.total.nan_to_num(posinf=1.0).clamp(max=1.0), 0.1)
        return decision

    def get_extra_state(self) -> Any:
        return self.mean

    def set_extra_state(self, state: Any) -> None:
        self.mean = state


@breaks("coefficients")
class MakesItLarger(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return Scale(1 / (norms.total + 1e-6), torch.ones_like(norms.total))


@breaks("coefficients")
class DividesZeroByZero(Strategy):
    def forward(self, norms: Norms) -> Decision:
        share = norms.slots.amax() / norms.total
        return Scale(torch.where(share > 2, 0.5, share.clamp(min=1.0)), share.nan_to_num())


@breaks("left alone")
class NearlyLeavesAlone(Strategy):
    def forward(self, norms: Norms) -> Decision:
        one = torch.ones_like(norms.total)
        return Scale(torch.where(norms.total < 1, 1 - 1e-6, at_one(norms).coefficient), one)


@breaks("left alone")
class SkipsQuietSteps(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return Scale(torch.ones_like(norms.total), torch.ones_like(norms.total), skip=norms.total < 0.5)


@breaks("decision")
class ReturnsANumber(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return Scale(0.5, 1.0)  # type: ignore[arg-type]


@breaks("decision")
class HasTheWrongShape(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return Scale(torch.ones(3), torch.ones(()))


@breaks("decision")
class HasTheWrongType(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return Scale(torch.ones((), dtype=torch.float64), torch.ones(()))


@breaks("decision")
class DecidesNothing(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return None  # type: ignore[return-value]


@breaks("state")
class Grows(Strategy):
    norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.ones(1))

    def decide(self, norms: Norms) -> Decision:
        decision = at_one(norms)
        self.norms = torch.cat((self.norms, norms.total.view(1)))
        return decision


@breaks("state")
class RemembersNaN(MovingAverage):
    def forward(self, norms: Norms) -> Decision:
        self.mean += norms.total / norms.total
        return at_one(norms)


@breaks("pure")
class ClipsTheNorms(Strategy):
    def forward(self, norms: Norms) -> Decision:
        decision = at_one(norms)
        norms.slots.clamp_(max=1.0)
        return decision


@breaks("goes on")
class LearnsFromZeros(Strategy):
    """Clips to the mean of the latest ten norms."""

    norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.ones(10))

    def forward(self, norms: Norms) -> Decision:
        decision = clipped_to(norms.total, self.norms.mean())
        self.norms.copy_(torch.cat((self.norms[1:], norms.total.view(1))))
        return decision


@breaks("goes on")
class SkipsForEver(MovingAverage):
    """A norm above 1.5 times the mean of those that were not skipped."""

    def forward(self, norms: Norms) -> Decision:
        threshold = torch.where(self.mean > 0, 1.5 * self.mean, math.inf)
        self.mean.copy_(torch.where(self.mean > 0, self.mean.lerp(norms.total, 0.1), norms.total))
        return Scale(torch.ones_like(norms.total), threshold, skip=norms.total > threshold)


@breaks("idempotent", memoryless=True)
class HalvesAboveATenth(Strategy):
    def forward(self, norms: Norms) -> Decision:
        tenth = torch.full_like(norms.total, 0.1)
        return Scale(torch.where(norms.total > tenth, 0.5, 1.0), tenth)


@breaks("slots")
class HasNoSuchGroup(Strategy):
    groups = ("weights", "biases")

    def group_of(self, parameter: Any) -> int:
        return 2 if "bias" in parameter.name else 0

    def forward(self, norms: Norms) -> Decision:
        return at_one(norms)


@breaks("runs")
class Raises(Strategy):
    def forward(self, norms: Norms) -> Decision:
        return clipped_to(norms.total, norms.slots[1])


@pytest.mark.parametrize(("law", "bad", "arguments"), BAD)
def test_a_bad_strategy_is_caught_by_the_law_that_it_breaks(
    law: str, bad: type[Strategy], arguments: dict[str, Any]
) -> None:
    with pytest.raises(LawBroken, match=f"{bad.__name__}.*breaks the law '{law}'") as caught:
        check_strategy(bad, steps=STEPS, **arguments)
    assert caught.value.law == law
    assert LAWS[law] in str(caught.value)


def test_every_law_is_broken_by_one_of_them() -> None:
    assert {bad.values[0] for bad in BAD} == set(LAWS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_a_good_strategy_passes(seed: int) -> None:
    check_strategy(MovingAverage, steps=STEPS, seed=seed)
    check_strategy(MovingAverage(), steps=STEPS, seed=seed)


def test_a_strategy_is_copied_and_stays_as_it_is() -> None:
    strategy = MovingAverage()
    strategy.decide(Norms(torch.tensor(3.0), torch.tensor([3.0])))
    before = copy.deepcopy(strategy.state_dict())
    states = torch.get_rng_state(), random.getstate(), dict(os.environ)
    check_strategy(strategy, steps=STEPS)
    assert strategy.state_dict() == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), dict(os.environ)) == states[1:]


def test_it_says_where() -> None:
    """The line that waits for the device; the step and its norms."""
    with pytest.raises(LawBroken, match=r"test_check_strategy\.py:\d+: if norms\.total > 1:"):
        check_strategy(AsksTheHost, steps=STEPS)
    with pytest.raises(
        LawBroken,
        match=r"coefficient is nan\n  in history 'zero at first', seed=5, step 0: total norm 0, slots \[0\]",
    ):
        check_strategy(DividesZeroByZero, steps=STEPS, seed=5)


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        (distclip.AGC(0.01, exclude=("head.*",)), {"memoryless": True, "one_threshold": False}),
        (distclip.Value(0.3, measure_direction=True), {}),
        (distclip.PerGroup({"*.bias": 0.2}), {"memoryless": True}),
        (distclip.GlobalNorm(1.0, math.inf), {"memoryless": True}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Strategy) else "",
)
def test_what_strategies_may_ask_for(strategy: Strategy, arguments: dict[str, Any]) -> None:
    check_strategy(strategy, steps=STEPS, **arguments)


def test_what_is_no_strategy() -> None:
    for wrong in (lambda: 1.0, 1.0):
        with pytest.raises(TypeError, match=r"expected a distclip\.Strategy"):
            check_strategy(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps=0"):
        check_strategy(MovingAverage, steps=0)
