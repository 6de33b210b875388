from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip.decide.norms import Norms
from distclip.strategies import Percentile


def norms(n: float) -> Norms:
    total = torch.tensor(n)
    return Norms(total, total.view(1))


def thresholds(strategy: Percentile, history: list[float]) -> list[float]:
    return [strategy.decide(norms(n)).threshold.item() for n in history]


def test_this_norm_counts_towards_its_own_threshold() -> None:
    strategy = Percentile(50, multiplier=2, history=3, warmup=2, initial=7.0)
    assert thresholds(strategy, [1.0, 3.0, 9.0, 5.0]) == [7.0, 4.0, 6.0, 10.0]


def test_autoclip_as_its_authors_wrote_it() -> None:
    """``clip_grad_norm_(parameters, numpy.percentile(history, 10))`` after appending the norm."""
    strategy = Percentile(10, multiplier=1, warmup=1, history=None)
    random = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.zeros(5))
    history = []
    for _ in range(300):
        gradient = torch.from_numpy(random.normal(size=5) * random.lognormal()).float()
        parameter.grad = gradient.clone()
        n = parameter.grad.norm()
        history.append(n.item())
        torch.nn.utils.clip_grad_norm_(parameter, float(np.percentile(history, 10)))
        ours = gradient * strategy.decide(norms(n.item())).coefficient
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_norm_is_compared_with_those_before_it(bad: float) -> None:
    strategy = Percentile(100, multiplier=1, history=4, warmup=1)
    assert thresholds(strategy, [2.0, bad, 1.0, bad]) == [2.0] * 4
    assert strategy.forward(norms(math.inf)).coefficient == 0
    assert strategy.forward(norms(math.nan)).coefficient.isnan()
    assert strategy.history.count == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_norm_drives_no_other_out(bad: float) -> None:
    strategy = Percentile(0, multiplier=1, history=2, warmup=1)
    assert thresholds(strategy, [1.0, 5.0, bad]) == [1.0] * 3


def test_a_norm_at_the_threshold_is_left_alone() -> None:
    assert Percentile(50, multiplier=1, warmup=1).decide(norms(1e-3)).coefficient == 1


def test_zero_norms_teach_nothing() -> None:
    strategy = Percentile(50, warmup=2, multiplier=1, initial=7.0)
    assert thresholds(strategy, [0.0] * 5 + [3.0, 0.0, 3.0, 0.0]) == [7.0] * 7 + [3.0] * 2
    assert strategy.decide(norms(0.0)).coefficient == 1


def test_another_norm_type() -> None:
    assert Percentile(norm_type="inf").norm_type == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": 101}, "percentile=101"),
        ({"percentile": -1}, "percentile=-1"),
        ({"multiplier": math.nan}, "multiplier=nan"),
        ({"multiplier": math.inf}, "multiplier=inf"),
        ({"initial": -1.0}, "initial=-1.0"),
        ({"history": 0}, "history=0"),
        ({"history": 10.5}, "history=10.5"),
        ({"warmup": 0}, "warmup=0"),
        ({"warmup": 2000}, "warmup=2000 is more than history=1000 keeps"),
        ({"norm_type": 4}, "norm_type=4"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Percentile(**arguments)


def test_the_ring_wraps_around() -> None:
    strategy = Percentile(0, multiplier=1, history=5, warmup=1)
    history: list[float] = np.random.default_rng(0).permutation(range(1, 41)).astype(float).tolist()
    expected = [min(history[max(0, i - 4) : i + 1]) for i in range(40)]
    assert thresholds(strategy, history) == expected
    ring: Tensor = strategy.history.values
    assert sorted(ring.tolist()) == sorted(history[-5:])
