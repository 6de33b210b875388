"""Failure 55, law 16: no norm that comes makes an adaptive threshold multiply a finite gradient by 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import distclip
from tests.faults.levels import ADAPTIVE, SEQUENCES, Decisions, Training, every, longest_run_of_skips, noise

ENTRANCES = ("clip", "step", "step, scaled")


def rows() -> list[tuple[str, str]]:
    """Each strategy over all sequences; those inside others, and with other arguments, over every third."""
    found = []
    for i, row in enumerate(ADAPTIVE):
        whole = not any(c in row for c in ",(")
        found += [(row, s) for j, s in enumerate(SEQUENCES) if whole or j % 3 == i % 3]
    return found


@pytest.mark.parametrize(("row", "sequence"), rows())
def test_55_56_no_gradient_becomes_0_and_no_run_of_skips_is_longer_than_stated(
    row: str, sequence: str
) -> None:
    decisions = Decisions(ADAPTIVE[row].make())
    steps = [decisions.step(norm) for norm in SEQUENCES[sequence]]
    for step in steps:
        assert not (math.isfinite(step.norm) and step.norm > 0) or step.left > 0, step
    assert longest_run_of_skips(steps) <= ADAPTIVE[row].patience
    assert sum(step.skipped for step in steps if math.isfinite(step.norm)) <= 0.3 * len(steps)
    # That all this was not about nothing, once no warm-up is left.
    level = next(norm for norm in SEQUENCES[sequence][::-1] if math.isfinite(norm) and norm > 0)
    for i in range(130):
        decisions.step(level * noise(i))
    last = decisions.step(1e6 * level)
    assert last.skipped or last.coefficient < 1e-2


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("row", ADAPTIVE)
def test_55_56_at_each_entrance(row: str, entrance: str) -> None:
    """The same, and the same decisions, where real gradients are clipped."""
    sequence = every(5, math.nan, every(3, 0.0, SEQUENCES["constant, then twice"]))[40:280]
    decisions, training = Decisions(ADAPTIVE[row].make()), Training(ADAPTIVE[row].make(), entrance)
    for norm in sequence:
        alone, step = decisions.step(norm), training.step(norm)
        if math.isfinite(norm):
            assert step.skipped == alone.skipped
            assert step.coefficient == pytest.approx(alone.coefficient, rel=1e-3)
            assert norm == 0 or step.left > 0


@pytest.mark.parametrize("row", ADAPTIVE)
def test_55_a_norm_of_0_teaches_nothing(row: str) -> None:
    """The same decisions with zeros between, and without."""
    with_zeros, without = ADAPTIVE[row].make(), ADAPTIVE[row].make()
    trainings = Decisions(with_zeros), Decisions(without)
    for i, norm in enumerate(SEQUENCES["ten times"][60:260]):
        for _ in range(i % 3):
            assert trainings[0].step(0.0).coefficient == 1
        first, second = (t.step(norm) for t in trainings)
        if not row.startswith(("AdaGC", "Chain(AdaGC")):  # whose warm-up counts steps
            assert first == second


@pytest.mark.parametrize("unit", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("row", ["percentile", "AutoClip", "AdaGC"])
def test_55_what_is_learned_has_the_unit_of_the_norms(row: str, unit: float) -> None:
    """An eps of 1e-6 beside norms of 1e-9 multiplied gradients by a thousandth of what was learned."""
    made: dict[str, Callable[[], distclip.Strategy]] = {
        "percentile": lambda: distclip.Percentile(90, multiplier=1.5, warmup=5, initial=math.inf),
        "AutoClip": lambda: distclip.Percentile(10, multiplier=1, warmup=1, history=None),
        "AdaGC": lambda: distclip.AdaGC(warmup=5, max_norm=math.inf),
    }
    one, tiny = Decisions(made[row]()), Decisions(made[row]())
    coefficients = []
    for i in range(40):
        norm = noise(i) * (30.0 if i % 10 == 9 else 1.0)
        coefficients.append(one.step(norm).coefficient)
        assert tiny.step(norm * unit).coefficient == pytest.approx(coefficients[-1], rel=2e-3)
    assert min(coefficients) < 0.5


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-30, 1e-12])
@pytest.mark.parametrize("row", ADAPTIVE)
def test_55_however_small_the_norms_before(row: str, tiny: float) -> None:
    """Thresholds that float32 cannot divide by the norm."""
    decisions = Decisions(ADAPTIVE[row].make())
    for norm in [tiny] * 130 + [1e30, 1.0, 3e38]:
        step = decisions.step(norm)
        assert step.coefficient > 0, step


@pytest.mark.parametrize(
    "strategy",
    [
        distclip.Percentile(50, history=20, warmup=5, initial=3.0),
        distclip.ZClip(warmup=5, max_norm=3.0),
        distclip.SkipSpikes(16, min_history=5),
    ],
    ids=lambda s: type(s).__name__,
)
def test_55_a_state_that_0_1_0_learned_from_zeros(strategy: distclip.Strategy) -> None:
    state = strategy.state_dict()
    for name in list(state):
        if name in ("skips", "skips_before", "outliers"):
            del state[name]
        elif "values" in name:
            state[name] = torch.zeros_like(state[name])
        elif "seen" in name:
            state[name] = torch.tensor(100)
    strategy.load_state_dict(state)
    training = Training(strategy)
    steps = [training.step(1.0) for _ in range(60)]
    assert all(step.left > 0 for step in steps)
    assert not steps[-1].skipped
    assert steps[-1].coefficient == 1


def test_55_max_norm_0_in_the_warm_up_of_adagc() -> None:
    """What the user asked for, and only for as long."""
    training = Training(distclip.AdaGC(warmup=3, max_norm=0.0))
    assert [training.step(1.0).left for _ in range(3)] == [0.0] * 3
    assert all(math.isinf(a) for a in training.clipper.strategy.average.tolist())  # type: ignore[operator, union-attr]
