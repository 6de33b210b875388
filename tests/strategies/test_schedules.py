from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.decide.norms import Norms
from distclip.strategies import Cosine, GlobalNorm, PerParameter, Strategy, Value, Warmup


def decide(strategy: Strategy, n: float = 1.0) -> float:
    total = torch.tensor(n)
    return strategy.decide(Norms(total, total.view(1), strategy.norm_type)).threshold.item()


def test_warmup_is_a_straight_line() -> None:
    ramp = Warmup(10.0, 1.0, steps=9)
    assert [ramp(torch.tensor(t)).item() for t in range(12)] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1]


def test_cosine_is_half_a_wave() -> None:
    wave = Cosine(3.0, 1.0, steps=4)
    values = [wave(torch.tensor(t)).item() for t in range(6)]
    assert values == pytest.approx([3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 1, 1])
    assert (values[0], values[4]) == (3.0, 1.0)


@pytest.mark.parametrize("schedule", [Warmup(0.1, 0.7, 3), Cosine(0.1, 0.7, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_schedules_return_float32_exact_at_both_ends(schedule: Warmup | Cosine, dtype: torch.dtype) -> None:
    first, last = (schedule(torch.tensor(t, dtype=dtype)) for t in (0, 3))
    assert first.dtype == torch.float32
    assert first == torch.tensor(0.1)
    assert last == torch.tensor(0.7)


@pytest.mark.parametrize("kind", [Warmup, Cosine])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0, 1.0, 5), "start=-1.0"), ((1.0, math.inf, 5), "end=inf"), ((1.0, 2.0, 0), "steps=0")],
)
def test_schedules_out_of_range(kind: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


takes_a_schedule = pytest.mark.parametrize("make", [GlobalNorm, PerParameter, Value])


@takes_a_schedule
def test_the_threshold_follows_the_schedule(make: Callable[[Any], Strategy]) -> None:
    strategy = make(Warmup(3.0, 1.0, steps=2))
    assert [decide(strategy) for _ in range(4)] == [3, 2, 1, 1]


@takes_a_schedule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_does_not_count(make: Callable[[Any], Strategy], bad: float) -> None:
    strategy = make(Warmup(3.0, 1.0, steps=2))
    assert [decide(strategy, n) for n in (1.0, bad, bad, 1.0, 1.0)] == [3, 2, 2, 2, 1]


@takes_a_schedule
def test_a_number_has_no_state(make: Callable[[Any], Strategy]) -> None:
    assert not make(1.0).state_dict()
    assert list(make(Warmup(1.0, 2.0, 3)).state_dict()) == ["threshold.step"]


@takes_a_schedule
@pytest.mark.parametrize("bad", [-1, math.nan, "much", None])
def test_numbers_out_of_range(make: Callable[[Any], Strategy], bad: Any) -> None:
    name = "clip_value" if make is Value else "max_norm"
    with pytest.raises(ValueError, match=f"{name}={bad!r}: expected a number that is not negative"):
        make(bad)


def test_any_callable_of_the_step() -> None:
    assert decide(GlobalNorm(lambda step: 2.0 * step + 1)) == 1
    assert decide(GlobalNorm(lambda step: 0.25)) == 0.25
    assert decide(GlobalNorm(lambda step: step - 5)) == 0  # a negative one would flip the gradient's sign


def test_a_callable_cannot_move_the_step() -> None:
    def careless(step: Tensor) -> Tensor:
        return step.add_(10)

    strategy = GlobalNorm(careless)
    assert [decide(strategy), decide(strategy)] == [10, 11]


def test_a_callable_that_returns_no_scalar() -> None:
    with pytest.raises(ValueError, match=r"max_norm=<.*returned shape \(2,\): expected 0-dim"):
        decide(GlobalNorm(lambda step: torch.ones(2)))


def test_a_scheduled_threshold_clips_as_the_number_does() -> None:
    n = torch.tensor([1e-9, 0.3, 0.7, 1.0, 20.0, 1e30])
    norms = Norms(n.norm(), n)
    a = PerParameter(0.7).decide(norms).coefficient
    b = PerParameter(lambda step: 0.7).decide(norms).coefficient
    torch.testing.assert_close(a, b, rtol=2e-7, atol=0.0)
    assert GlobalNorm(lambda step: math.inf).decide(norms).coefficient == 1
