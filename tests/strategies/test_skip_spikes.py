from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distclip.decide.norms import Norms
from distclip.strategies import SkipSpikes


def skips(strategy: SkipSpikes, n: float) -> bool:
    total = torch.tensor(n)
    decision = strategy.decide(Norms(total, total.view(1)))
    assert decision.coefficient == 1
    assert decision.skip is not None
    return bool(decision.skip)


def after(*norms: float, **arguments: Any) -> SkipSpikes:
    strategy = SkipSpikes(**{"window": 4, "sigma": 2.0, "min_history": 3, **arguments})
    for n in norms:
        assert not skips(strategy, n)
    return strategy


def test_the_threshold_is_that_of_the_previous_norms() -> None:
    # mean 2, unbiased deviation √2
    assert skips(after(1.0, 3.0), 2 + 2 * math.sqrt(2) + 0.01)
    assert not skips(after(1.0, 3.0), 2 + 2 * math.sqrt(2) - 0.01)
    total = torch.tensor(1.0)
    decision = after(1.0, 3.0).decide(Norms(total, total.view(1)))
    assert decision.threshold == pytest.approx(2 + 2 * math.sqrt(2))


def test_nothing_is_skipped_before_min_history() -> None:
    after(1.0, 1e9)
    strategy = after(1.0, 1.1, 1.0, min_history=5)
    assert not skips(strategy, 1e9)


def test_the_defaults_judge_from_the_64th_norm_as_olmo_core() -> None:
    def usual(steps: int) -> SkipSpikes:
        strategy = SkipSpikes()
        for i in range(steps):
            assert not skips(strategy, 1.0 + i % 2)
        return strategy

    assert not skips(usual(62), 1e9)
    assert skips(usual(63), 1e9)


def test_a_low_norm_is_no_spike() -> None:
    assert not skips(after(5.0, 5.1, 5.0), 0.0)


def test_only_the_window_counts() -> None:
    strategy = after(1.0, 50.0, 3.0, 2.0, 3.0, 2.0)  # the 50 is gone
    assert skips(strategy, 20.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_once_steps_are_judged(bad: float) -> None:
    assert not skips(after(1.0), bad)
    assert skips(after(1.0, 2.0), bad)


def test_a_raised_level_is_learned_after_patience_skips_or_when_told_to_forget() -> None:
    strategy = after(1.0, 1.1, 0.9, 1.0, patience=7)
    assert all(skips(strategy, 10.0 + i % 2) for i in range(7))
    assert not any(skips(strategy, 10.0 + i % 2) for i in range(50))
    assert skips(strategy, 1e3)  # the new level has spikes too
    strategy = after(1.0, 1.1, 0.9, 1.0, patience=7)
    assert all(skips(strategy, 10.0) for _ in range(6))
    strategy.forget()
    assert not any(skips(strategy, 10.0 + i % 2) for i in range(50))
    assert all(skips(strategy, 1e3) for _ in range(7))


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
def test_what_has_no_norm_neither_counts_nor_ends_a_run(nothing: float) -> None:
    strategy = after(1.0, 1.1, 0.9, 1.0, patience=3)
    for _ in range(3):
        assert skips(strategy, 10.0)
        skips(strategy, nothing)
    assert not skips(strategy, 10.0)


def test_a_step_that_is_taken_ends_a_run() -> None:
    strategy = after(1.0, 1.1, 0.9, 1.0, patience=3)
    for _ in range(10):
        assert skips(strategy, 10.0)
        assert skips(strategy, 10.0)
        assert not skips(strategy, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window=1"),
        ({"sigma": -1}, "sigma=-1"),
        ({"min_history": 2}, "min_history=2"),
        ({"patience": 0}, "patience=0"),
        ({"window": 50}, "min_history=64 is more than window=50 keeps"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipSpikes(**arguments)
