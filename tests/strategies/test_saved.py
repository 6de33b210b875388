"""Whose a saved state is: another strategy's, or one of other sizes, is a sentence that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distclip
from distclip import (
    AGC,
    AdaGC,
    Chain,
    GlobalNorm,
    Norms,
    Percentile,
    PerGroup,
    SkipSpikes,
    Strategy,
    Value,
    Warmup,
    ZClip,
)

MADE: dict[str, Callable[[], Strategy]] = {
    "GlobalNorm": lambda: GlobalNorm(1.0),
    "Value": lambda: Value(1.0),
    "PerGroup": lambda: PerGroup({"*": 1.0}),
    "AGC": lambda: AGC(),
    "GlobalNorm, Warmup": lambda: GlobalNorm(Warmup(1.0, 2.0, 5)),
    "ZClip": lambda: ZClip(),
    "Percentile": lambda: Percentile(),
    "SkipSpikes": lambda: SkipSpikes(),
    "SkipSpikes, loss": lambda: SkipSpikes(use_loss=True),
    "AdaGC": lambda: AdaGC(),
    "Chain(ZClip, GlobalNorm)": lambda: Chain(ZClip(), GlobalNorm(1.0)),
    "Chain(GlobalNorm, ZClip)": lambda: Chain(GlobalNorm(1.0), ZClip()),
    "Chain(SkipSpikes, Percentile, Value)": lambda: Chain(SkipSpikes(), Percentile(), Value(1.0)),
}
STATELESS = ("GlobalNorm", "Value", "PerGroup", "AGC")


@pytest.mark.parametrize("this", MADE)
@pytest.mark.parametrize("saved", MADE)
def test_of_another_strategy(saved: str, this: str) -> None:
    state, strategy = MADE[saved]().state_dict(), MADE[this]()
    before = copy.deepcopy(strategy.state_dict())
    if saved == this or {saved, this} <= set(STATELESS):
        strategy.load_state_dict(state)
        return
    with pytest.raises(ValueError, match="out to start anew") as caught:
        strategy.load_state_dict(state)
    said = str(caught.value)
    if (saved, this) == ("Percentile", "SkipSpikes"):  # whose states look alike but for their length
        assert "was saved with window=1000, this one has window=128" in said
        return
    assert "saved by" in said
    assert f"this is {this.split(',')[0].split('(')[0]}" in said or "links[" in said
    assert str(before) == str(strategy.state_dict())


@pytest.mark.parametrize(
    ("saved", "this", "message"),
    [
        (ZClip(), GlobalNorm(), r"the state was saved by ZClip\(.*, this is GlobalNorm\("),
        (GlobalNorm(), ZClip(), r"the state was saved by GlobalNorm\(.*, this is ZClip\("),
        (AdaGC(), Percentile(), r"saved by AdaGC\(.*, this is Percentile\("),
        (Chain(ZClip(), Value(1.0)), ZClip(), r"saved by Chain\(ZClip\(.*, this is ZClip\("),
        (ZClip(), Chain(ZClip(), Value(1.0)), r"saved by ZClip\(.*, this is Chain\(ZClip\("),
        (GlobalNorm(Warmup(1, 2, 3)), GlobalNorm(), "that depends on the step, this is GlobalNorm"),
        (SkipSpikes(use_loss=True), SkipSpikes(), r"SkipSpikes with other settings \(it also has losses"),
        (SkipSpikes(), SkipSpikes(use_loss=True), r"SkipSpikes with other settings \(it lacks losses"),
        (Percentile(history=500), Percentile(history=200), "with history=500, this one has history=200"),
        (ZClip(warmup=10), ZClip(), "with warmup=10, this one has warmup=25"),
        (SkipSpikes(100), SkipSpikes(), "with window=100, this one has window=128"),
        (
            Chain(GlobalNorm(), Percentile(history=500)),
            Chain(GlobalNorm(), Percentile()),
            r"links\[1\]: the state of Percentile was saved with history=500",
        ),
        (
            Chain(GlobalNorm(), Percentile()),
            Chain(GlobalNorm(), ZClip()),
            r"saved by Chain\(GlobalNorm\(.* Percentile\(.*, this is Chain\(GlobalNorm\(.* ZClip\(",
        ),
    ],
)  # fmt: skip
def test_the_sentence(saved: Strategy, this: Strategy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distclip.Clipper([], this).load_state_dict(distclip.Clipper([], saved).state_dict())


@pytest.mark.parametrize("wrong", [None, 3, [1, 2]])
def test_what_is_no_state(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"is no state of ZClip: expected what its state_dict\(\) returned"):
        ZClip().load_state_dict(wrong)


@pytest.mark.parametrize(
    "name", ["ZClip", "SkipSpikes", "SkipSpikes, loss", "Chain(SkipSpikes, Percentile, Value)"]
)
def test_states_that_0_1_0_saved(name: str) -> None:
    """Which lack what has come since, and go on as they would have."""
    one, other = MADE[name](), MADE[name]()
    for i in range(30):
        total = torch.tensor(1 + 0.1 * (i % 7))
        one.decide(Norms(total, total.view(1), loss=total))
    state = {
        k: v
        for k, v in one.state_dict().items()
        if k.split(".")[-1] not in ("skips", "skips_before", "outliers")
    }
    assert state.keys() < one.state_dict().keys()
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(one.state_dict())
    torch.nn.ModuleList([MADE[name]()]).load_state_dict({f"0.{k}": v for k, v in state.items()})


def test_a_strategy_of_the_users_own() -> None:
    class Own(Strategy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("best", torch.zeros(()))

    Own().load_state_dict(Own().state_dict())
    with pytest.raises(ValueError, match=r"saved by another strategy \(one with best\), this is ZClip"):
        ZClip().load_state_dict(Own().state_dict())
    with pytest.raises(ValueError, match="saved by ZClip, this is Own"):
        Own().load_state_dict(ZClip().state_dict())
    assert Own().load_state_dict({}, strict=False).missing_keys == ["best"]
