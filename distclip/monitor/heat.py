"""Norms of modules over a run, as a small table to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclip.monitor.run import Run

ROWS, COLUMNS = 40, 300


def heat_of(run: Run) -> dict[str, Any] | None:
    """At most ``ROWS`` modules by ``COLUMNS`` bins of steps, the largest norm in each; None without any."""
    if not run.param_names or not len(run.param_steps):
        return None
    names, index = modules_of(run.param_names)
    powers = np.nan_to_num(run.param_norms.astype(np.float64), nan=np.nan, posinf=np.nan)
    p = run.norm_type
    rows = []
    for module in range(len(names)):
        mine = powers[:, index == module]
        rows.append(mine.max(axis=1) if np.isinf(p) else (mine**p).sum(axis=1) ** (1 / p))
    norms = np.stack(rows)  # [modules, steps]
    width = -(-norms.shape[1] // COLUMNS)
    edges = np.arange(0, norms.shape[1], width)
    binned = np.fmax.reduceat(norms, edges, axis=1)
    drawn = np.where(binned > 0, binned, np.nan)
    logs = np.log10(drawn)
    return {
        "x": run.param_steps[edges].tolist(),
        "names": list(names),
        "z": [[round(v, 3) if v == v else None for v in row] for row in logs.tolist()],
        "norms": [[float(f"{v:.4g}") if v == v else None for v in row] for row in drawn.tolist()],
    }


def modules_of(names: tuple[str, ...]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """As many parts of the names as give at most ``ROWS`` different ones; of each name, which it is."""
    deepest = max(name.count(".") + 1 for name in names)
    for depth in range(deepest, 0, -1):
        labels = [".".join(name.split(".")[:depth]) for name in names]
        unique = tuple(dict.fromkeys(labels))
        if len(unique) <= ROWS:
            break
    else:
        unique = (*unique[: ROWS - 1], "(others)")
    place = {label: i for i, label in enumerate(unique)}
    return unique, np.array([place.get(label, len(unique) - 1) for label in labels])
