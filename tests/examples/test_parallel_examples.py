"""The examples of tensor, pipeline and expert parallelism, run as their users run them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest

from tests.starting import start

RANKS = 2


@dataclass(frozen=True)
class Step:
    """One line of the table that each example prints."""

    loss: float
    whole: float  # the norm of the gathered gradient
    norm: float
    alone: list[float]  # what each rank finds in its own gradients
    rest: list[str]


@cache
def run(example: str, *options: str) -> tuple[list[Step], str]:
    """The steps of a run, which has to end cleanly, and all that it printed."""
    out, _ = start(example, *options, ranks=RANKS)
    steps = []
    for line in out.splitlines():
        if line[:1].isdigit() and " | " in line:
            _, loss, whole, norm, alone, *rest = line.split(" | ")
            norms = [float(n) for n in alone.split()]
            steps.append(Step(float(loss), float(whole), float(norm), norms, rest))
    return steps, out


RUNS = [
    ("tensor_parallel.py",),
    ("tensor_parallel.py", "--dtensor"),
    ("pipeline.py",),
    ("pipeline.py", "--interleaved"),
    ("moe.py",),
]


@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_one_norm_and_no_rank_has_it_alone(command: tuple[str, ...]) -> None:
    steps, text = run(*command)

    assert len(steps) >= 8
    assert steps[-1].loss < 0.6 * steps[0].loss
    for step in steps:
        assert step.norm == pytest.approx(step.whole, rel=2e-6)
        assert len(set(step.alone)) == RANKS
    off = max(abs(n / step.whole - 1) for step in steps for n in step.alone)
    assert off > 0.05
    assert "parameters on this rank" in text  # describe()


def test_by_hand_and_by_torch_it_is_the_same_norm() -> None:
    by_hand, _ = run("tensor_parallel.py")
    by_torch, _ = run("tensor_parallel.py", "--dtensor")

    assert [s.norm for s in by_hand] == pytest.approx([s.norm for s in by_torch], rel=1e-5)
    assert [s.loss for s in by_hand] == pytest.approx([s.loss for s in by_torch], rel=1e-4)


@pytest.mark.parametrize("options", [(), ("--interleaved",)])
def test_copies_of_a_tied_embedding_stay_equal(options: tuple[str, ...]) -> None:
    steps, text = run("pipeline.py", *options)

    assert "copies of the embedding: equal" in text
    # The embedding is counted once: both ranks together would count more than the whole.
    assert all(sum(n * n for n in s.alone) > 1.1 * s.whole**2 for s in steps)


def test_an_expert_without_a_token() -> None:
    steps, _ = run("moe.py")

    busy = [step.rest[0].split() for step in steps]
    assert busy.count(["yes", "no"]) == 3
    assert busy.count(["yes", "yes"]) == 6
