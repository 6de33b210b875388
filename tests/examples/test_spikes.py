"""The comparison of strategies runs, alone and under torchrun, and says the same for both."""

from __future__ import annotations

from functools import cache

import pytest

from tests.starting import start


@cache
def table(ranks: int) -> list[list[str]]:
    """The cells of the rows that it prints, below the heading."""
    out, progress = start("spikes.py", "--quick", ranks=ranks if ranks > 1 else 0)
    assert "100%" in progress  # the progress bar
    heading, rule, *rows = out.splitlines()
    assert heading.count("|") == rule.count("|") == 6
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_what_it_compares() -> None:
    rows = {name: rest for name, *rest in table(1)}
    losses = {name: float(rest[0].split(" ± ")[0]) for name, rest in rows.items()}
    assert all(2 < loss < 7 for loss in losses.values())
    assert rows["unclipped"][1:] == ["0.0%", "0.0%", "0%"]
    assert rows["`GlobalNorm(1.0)`"][3] == "100%"  # every corrupted batch is clipped
    assert losses["unclipped, no bad batches"] < losses["`GlobalNorm(1.0)`"] < losses["unclipped"]


def test_two_ranks_say_the_same() -> None:
    for alone, together in zip(table(1), table(2), strict=True):
        assert together[0] == alone[0]
        assert together[2:] == alone[2:]
        for a, b in zip(alone[1].split(" ± "), together[1].split(" ± "), strict=True):
            assert float(a) == pytest.approx(float(b), abs=0.05)
