from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distclip.decide.decision import Scale
from distclip.decide.norms import Norms
from distclip.strategies import ZClip


def decide(strategy: ZClip, n: float) -> Scale:
    total = torch.tensor(n)
    decision = strategy.decide(Norms(total, total.view(1)))
    assert isinstance(decision, Scale)
    return decision


def warm(**arguments: Any) -> ZClip:
    """Of mean 2 and standard deviation 1."""
    strategy = ZClip(**{"warmup": 2, "max_norm": math.inf, "eps": 0.0, **arguments})
    decide(strategy, 1.0)
    decide(strategy, 3.0)
    return strategy


def test_the_warm_up_clips_at_max_norm_only() -> None:
    strategy = ZClip(warmup=3, max_norm=2.0, eps=0.0)
    assert [decide(strategy, n).coefficient.item() for n in (1.0, 1000.0, 8.0)] == [
        1.0,
        pytest.approx(0.002),
        0.25,
    ]
    assert strategy.mean == pytest.approx(1009 / 3)


def test_the_further_out_the_lower_the_threshold() -> None:
    # z = 5: 2 + 2.5·1 / (5 / 2.5) = 3.25
    assert decide(warm(), 7.0).threshold == 3.25
    assert decide(warm(), 7.0).coefficient.item() == pytest.approx(3.25 / 7)
    assert decide(warm(), 12.0).threshold == 2.625
    assert decide(warm(), 4.4).coefficient == 1
    assert decide(warm(), 4.4).threshold == 4.5  # what would have been clipped


def test_the_averages_are_fed_the_reduced_norm() -> None:
    strategy = warm(alpha=0.5, max_norm=0.1)  # not the one that max_norm leaves
    decide(strategy, 7.0)
    assert strategy.mean == pytest.approx(2.625)
    assert strategy.variance == pytest.approx(0.5 + 0.5 * (3.25 - 2.625) ** 2)


def test_eps_is_part_of_the_deviation() -> None:
    assert decide(warm(eps=1.0), 6.9).coefficient == 1  # z < 2.5
    assert decide(warm(eps=1.0), 7.1).coefficient < 1


def test_constant_norms_have_no_deviation() -> None:
    strategy = ZClip(warmup=3, max_norm=10.0)
    for _ in range(20):
        assert decide(strategy, 1.0).coefficient == 1
    assert decide(strategy, 0.0).coefficient == 1
    assert decide(strategy, 5.0).coefficient == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"z_threshold": 0}, "z_threshold=0"),
        ({"max_norm": -1}, "max_norm=-1"),
        ({"warmup": 0}, "warmup=0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZClip(**arguments)
