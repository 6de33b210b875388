"""``test_table`` as a table: python -m tests.step.show"""

from __future__ import annotations

from itertools import product
from typing import Any

from tests.harness import Job, pool
from tests.step import test_table
from tests.step.spread import ROWS, SCALERS

Cell = tuple[list[test_table.Step], float]


def cell(row: str, apply: str, scaler: str) -> list[Cell]:
    """What every rank saw; raises where any differs from what one process in float64 does."""
    body: Any = test_table.test_cell.__body__  # type: ignore[attr-defined]
    if ROWS[row].world == 1:
        return [body(row, apply, scaler)]
    job = Job(test_table.__name__, "test_cell", (row, apply, scaler), {}, with_rank=False)
    return pool(ROWS[row].world).run(job, timeout=60.0)


def line(row: str, apply: str, scaler: str) -> str:
    ranks = cell(row, apply, scaler)
    steps, error = ranks[0]
    did = {
        bad: {"skip" if s.skipped else "step" for s in steps if s.bad == bad}
        for bad in ("None", "inf", "nan")
    }
    decisions = "  ".join("/".join(sorted(d)).ljust(6) for d in did.values())
    alike = "alike" if all(r == ranks[0] for r in ranks) else "DIFFERENT"
    return (
        f"{row:22} {apply:9} {scaler:18} {decisions}  {steps[-1].scale:5g}  {error:.0e}  "
        f"{len(ranks)} rank(s) {alike}"
    )


if __name__ == "__main__":
    print(f"{'placement':22} {'applied':9} {'scaler':18} finite  inf     NaN     scale  error")
    for key in product(ROWS, ("inplace", "deferred"), SCALERS):
        print(line(*key), flush=True)
