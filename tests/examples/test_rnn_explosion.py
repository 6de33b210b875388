"""The exploding gradient, run as its users run it: what survives, in the table and in the plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import image

from tests.starting import start


def test_clipped_runs_learn_where_the_unclipped_explodes(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    out, errors = start("rnn_explosion.py", "--steps", "120", "--seeds", "2", "--picture", str(picture))
    assert errors == ""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines()[2:]]
    rows = {name: rest for name, *rest in cells}
    assert len(rows) == 6

    exploded, loss, norm, clipped, _ = rows.pop("unclipped")
    assert (exploded, loss, clipped) == ("2 of 2", "", "0%")
    assert float(norm) > 1e6

    for name in ("GlobalNorm(1)", "Chain(Percentile(90), GlobalNorm(1))", "ZClip(), at most 1"):
        exploded, loss, norm, clipped, direction = rows.pop(name)
        assert exploded == "0 of 2"
        assert float(loss) < 0.2  # a guess: 0.33
        assert 1 < float(norm) < 1e6  # before clipping: it had to
        assert 0 < float(clipped.rstrip("%")) < 100
        assert direction == "1.00"

    exploded, loss, _, _, direction = rows.pop("Value(0.1)")
    assert exploded == "0 of 2"
    assert float(loss) < 0.33
    assert 0.5 < float(direction) < 0.99  # it alone turns the gradient

    # Those that explode are drawn in red, and no others: the columns of the plot, left to right.
    pixels = image.imread(picture)[..., :3]
    red = (np.abs(pixels - np.array([214, 39, 40]) / 255) < 0.02).all(-1).sum(0)
    columns = [part.sum() for part in np.array_split(red[int(0.06 * len(red)) :], 6)]
    assert columns[0] > 20
    assert [columns[i] for i in (1, 2, 4, 5)] == [0, 0, 0, 0]
