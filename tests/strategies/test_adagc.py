from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from distclip.decide.decision import Scale
from distclip.decide.norms import Norms, combine
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies import AdaGC


def infos(names: str) -> list[ParameterInfo]:
    return [ParameterInfo(name, torch.Size([2])) for name in names]


def decide(strategy: AdaGC, *parts: float) -> Scale:
    slots = torch.tensor(parts)
    decision = strategy.decide(Norms(combine(slots, 2.0), slots))
    assert isinstance(decision, Scale)
    return decision


def made(names: str, **arguments: Any) -> AdaGC:
    strategy = AdaGC(**{"ratio": 2.0, "beta": 0.5, "eps": 0.0, "warmup": 1, "max_norm": 10.0, **arguments})
    strategy.prepare(infos(names))
    return strategy


def averages(strategy: AdaGC) -> Sequence[float]:
    values: list[float] = strategy.average.tolist()
    return values


def test_the_warm_up_clips_the_whole_and_keeps_the_smallest() -> None:
    strategy = made("ab", warmup=2)
    decision = decide(strategy, 12.0, 16.0)  # 20 -> 10
    assert (decision.coefficient == 0.5).all()
    assert averages(strategy) == [6.0, 8.0]
    decide(strategy, 3.0, 9.0)
    assert averages(strategy) == [3.0, 8.0]


def test_each_is_held_to_its_own_average() -> None:
    strategy = made("ab")
    decide(strategy, 1.0, 4.0)
    decision = decide(strategy, 5.0, 5.0)
    assert decision.coefficient.tolist() == pytest.approx([0.4, 1.0])
    assert decision.threshold.tolist() == [2.0, 8.0]
    assert averages(strategy) == [1.5, 4.5]


def test_a_parameter_that_takes_no_part_keeps_its_average() -> None:
    """Else one step without a gradient in the warm-up would multiply it by 0 for ever."""
    strategy = made("ab", warmup=2)
    decide(strategy, 1.0, 1.0)
    decide(strategy, 1.0, 0.0)
    for _ in range(50):
        decide(strategy, 1.0, 0.0)
    assert averages(strategy) == [1.0, 1.0]
    assert decide(strategy, 1.0, 1.5).coefficient.tolist() == [1.0, 1.0]


def test_a_parameter_that_comes_late_starts_at_max_norm() -> None:
    strategy = made("ab")
    decide(strategy, 1.0, 0.0)
    assert decide(strategy, 1.0, 40.0).coefficient.tolist() == [1.0, 0.25]
    assert averages(strategy) == [1.0, 10.0]


def test_parameters_that_begin_to_train_leave_the_others_their_averages() -> None:
    strategy = made("ac")
    decide(strategy, 1.0, 4.0)
    strategy.prepare(infos("abc"))
    assert averages(strategy) == [1.0, math.inf, 4.0]


@pytest.mark.parametrize("early", [True, False], ids=["before prepare", "after prepare"])
def test_a_state_of_other_parameters(early: bool) -> None:
    saved = made("abc")
    decide(saved, 1.0, 2.0, 3.0)
    state = saved.state_dict()
    message = r"no average for x: new here.*it has one for b: not clipped here"
    if early:
        strategy = AdaGC()
        strategy.load_state_dict(state)
        with pytest.warns(UserWarning, match=message):
            strategy.prepare(infos("cax"))
    else:
        strategy = made("cax")
        with pytest.warns(UserWarning, match=message):
            strategy.load_state_dict(state)
    assert averages(strategy) == [3.0, 1.0, math.inf]
    assert strategy.step == 1


def test_a_state_that_waits_for_the_parameters_can_be_saved_again() -> None:
    saved = made("ab")
    decide(saved, 1.0, 2.0)
    waiting, last = AdaGC(), made("ba")
    waiting.load_state_dict(saved.state_dict())
    last.load_state_dict(waiting.state_dict())
    assert averages(last) == [2.0, 1.0]


def test_parameters_of_the_same_name_keep_their_own() -> None:
    saved, loaded = made("aba"), made("aba")
    decide(saved, 1.0, 2.0, 3.0)
    loaded.load_state_dict(saved.state_dict())
    assert averages(loaded) == [1.0, 2.0, 3.0]


def test_a_loaded_state_is_a_copy() -> None:
    saved = made("ab")
    decide(saved, 1.0, 2.0)
    loaded = AdaGC(ratio=2.0, beta=0.5)
    loaded.load_state_dict(saved.state_dict())
    decide(saved, 2.0, 4.0)
    loaded.prepare(infos("ab"))
    assert averages(loaded) == [1.0, 2.0]


def test_unprepared() -> None:
    with pytest.raises(RuntimeError, match="norms of 2 parameters and was prepared for 0"):
        decide(AdaGC(), 1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.9}, "ratio=0.9"),
        ({"ratio": math.inf}, "ratio=inf"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"eps": -1}, "eps=-1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"max_norm": math.nan}, "max_norm=nan"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaGC(**arguments)
