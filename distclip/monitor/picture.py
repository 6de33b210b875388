"""A still picture of one run, or several: for a paper, a chat, a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distclip.monitor.envelope import envelope, rate
from distclip.monitor.recommendation import recommend
from distclip.monitor.replaying import Tally
from distclip.monitor.run import HistoryError, Run

COLORS = ("#2563eb", "#7c3aed", "#059669", "#d97706", "#dc2626")
INK, SOFT, GRID = "#16202e", "#5b6878", "#e6eaf0"


def write_picture(path: str | Path, runs: Sequence[Run], *, replays: Sequence[Tally] = ()) -> None:
    """Write a PNG with the norm and the threshold, the clip rate, and the distribution of norms.

    Raises:
        HistoryError: a run has no finite norm.
        OSError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["norm", "norm"], ["rate", "histogram"]], height_ratios=[1.5, 1])
    for axis in axes.values():
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(colors=SOFT, labelsize=9)
    top, below, right = axes["norm"], axes["rate"], axes["histogram"]
    for i, run in enumerate(runs):
        run.require_finite()
        color, name = COLORS[i % len(COLORS)], Path(run.name).name
        line = envelope(run.step, np.where(run.norm > 0, run.norm, np.nan))
        if not line.exact:
            top.fill_between(line.step, line.low, line.high, color=color, alpha=0.25, linewidth=0)
        top.plot(line.step, line.middle, color=color, linewidth=1.2, label=name)
        if run.whole and np.isfinite(run.threshold).any():
            limit = envelope(run.step, run.threshold)
            top.plot(
                limit.step,
                limit.middle,
                color="#d97706",
                linewidth=1.6,
                label="threshold" if len(runs) == 1 else f"threshold of {name}",
            )
        starts, share = rate(run.step, run.clipped)
        below.step(starts, 100 * share, where="post", color=color, linewidth=1.4)
        positive = run.norm[np.isfinite(run.norm) & (run.norm > 0)]
        edges = np.geomspace(positive.min() * 0.98, positive.max() * 1.02, 60)
        right.hist(positive, bins=edges.tolist(), color=color, alpha=0.85 if len(runs) == 1 else 0.5)
    for i, replay in enumerate(replays):
        limit = envelope(runs[0].step, replay.threshold)
        top.plot(limit.step, limit.middle, linewidth=1.4, color=COLORS[1:][i % 4], label=replay.name)
    if len(runs) == 1 and not replays:
        try:
            advised = recommend(runs[0])
        except HistoryError:  # too few steps
            pass
        else:
            label = f"recommended: {advised.strategy}"
            top.axhline(advised.max_norm, color="#059669", linewidth=1.4, linestyle="--", label=label)
            right.axvline(advised.max_norm, color="#059669", linewidth=1.4, linestyle="--")
    top.set_yscale("log")
    right.set_xscale("log")
    for ruled in (top.yaxis, right.xaxis):
        for kind in ("major", "minor"):
            getattr(ruled, f"set_{kind}_formatter")(
                LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6))
            )
    for axis in (top, right):
        axis.tick_params(which="minor", colors=SOFT, labelsize=9)
    top.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right", ncols=2)
    below.set_ylim(-3, 105)
    for axis, x, y in ((top, "step", "gradient norm"), (below, "step", "steps clipped, %")):
        axis.set_xlabel(x, color=SOFT, fontsize=9)
        axis.set_ylabel(y, color=SOFT, fontsize=9)
    right.set_xlabel("gradient norm", color=SOFT, fontsize=9)
    right.set_ylabel("steps", color=SOFT, fontsize=9)
    figure.savefig(path, format="png")
