"""The demo, run as its users run it: under torchrun, in processes of its own."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.starting import start

SMALL = ("--batch-size", "16", "--seq-len", "32")
ENOUGH = ("--steps", "80")  # for the loss to fall, and three times what it takes to blow up


@cache  # the runs that several tests look at
def run(*options: str, ranks: int = 2) -> dict[str, str]:
    """What a run says at its end, by label. It has to end cleanly.

    ``ranks=0`` starts it without a launcher.
    """
    out, _ = start("char_lm.py", *SMALL, *options, ranks=ranks)
    return dict(re.findall(r"^(.+?): (.+)$", out, flags=re.MULTILINE))


def first_norms(summary: dict[str, str]) -> list[float]:
    return [float(norm) for norm in summary["first norms"].split()]


@pytest.mark.parametrize(("parallel", "ranks"), [("fsdp2", 2), ("tp", 2), ("hsdp", 4), ("fsdp2", 0)])
def test_the_norms_do_not_depend_on_how_the_model_is_spread(parallel: str, ranks: int) -> None:
    replicated = first_norms(run(*ENOUGH))
    spread = run("--steps", "3", "--parallel", parallel, ranks=ranks)

    assert len(set(replicated)) == 3  # three steps, three batches
    assert first_norms(spread) == pytest.approx(replicated, rel=1e-5)
    assert spread[f"norms on all {ranks or 1} ranks"] == "bit-identical"


def test_clipping_is_what_keeps_the_training_alive() -> None:
    clipped, unclipped = run(*ENOUGH), run(*ENOUGH, "--unclipped")

    assert float(clipped["final loss"]) < 2.7  # 5.5 for a uniform guess, 3.1 for letter frequencies
    assert 0.1 < float(clipped["clip rate"]) < 1
    assert unclipped["final loss"] == "nan"
    assert float(unclipped["clip rate"]) == 0
    # Up to the first optimizer step, the two are the same run.
    assert first_norms(unclipped)[0] == pytest.approx(first_norms(clipped)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "max_norm", "lr", "parallel", "ranks"),
    [
        ("value", "0.01", "0.1", "ddp", 0),
        ("per-parameter", "0.1", "1", "fsdp2", 0),
        ("per-group", "0.1", "1", "tp", 2),
    ],
)
def test_every_strategy_trains_a_transformer(
    strategy: str, max_norm: str, lr: str, parallel: str, ranks: int
) -> None:
    summary = run(
        *("--model", "transformer", "--parallel", parallel, "--steps", "30"),
        *("--strategy", strategy, "--max-norm", max_norm, "--lr", lr),
        ranks=ranks,
    )

    assert float(summary["clip rate"]) == 1
    assert float(summary["final loss"]) < 4
    assert summary[f"norms on all {ranks or 1} ranks"] == "bit-identical"
