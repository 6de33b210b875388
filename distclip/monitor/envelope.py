"""Long series as few points that still show every spike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distclip.monitor.run import Floats

POINTS = 1200
EXACT = 3000
"""Up to so many steps, every one is a point."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """A series in so many bins: its smallest, median and largest value in each. NaN where a bin
    has no finite value. For a short series all three are the series itself."""

    step: NDArray[np.int64]
    low: Floats
    middle: Floats
    high: Floats

    @property
    def exact(self) -> bool:
        return self.low is self.high


def envelope(step: NDArray[np.int64], values: Floats, points: int = POINTS) -> Envelope:
    """``step`` of a bin is its first step."""
    values = np.where(np.isfinite(values), values, np.nan)
    n = len(values)
    if n <= max(points, EXACT):
        return Envelope(step, values, values, values)
    width = -(-n // points)
    bins = -(-n // width)
    padded = np.full(bins * width, np.nan)
    padded[:n] = values
    ordered = np.sort(padded.reshape(bins, width), axis=1)  # NaN comes last
    count = np.isfinite(ordered).sum(axis=1)
    rows = np.arange(bins)
    last = np.maximum(count - 1, 0)
    return Envelope(step[::width], ordered[:, 0], ordered[rows, last // 2], ordered[rows, last])


def rate(
    step: NDArray[np.int64], flags: NDArray[np.bool_], points: int = 200
) -> tuple[NDArray[np.int64], Floats]:
    """The share of true flags in each of at most ``points`` equal bins."""
    n = len(flags)
    width = max(1, min(max(20, -(-n // points)), n))
    edges = np.arange(0, n, width)
    counts = np.diff(np.append(edges, n))
    return step[edges], np.add.reduceat(flags.astype(np.float64), edges) / counts
