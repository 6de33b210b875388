"""One self-contained page about one run, or several beside each other."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from distclip._version import __version__
from distclip.monitor.envelope import Envelope, envelope, rate
from distclip.monitor.heat import heat_of
from distclip.monitor.recommendation import Recommendation, recommend
from distclip.monitor.replaying import Tally
from distclip.monitor.run import Floats, HistoryError, Run

SPIKES_SHOWN = 100
MARKS_SHOWN = 500


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    *,
    replays: Sequence[Tally] = (),
    title: str | None = None,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Write an HTML page with interactive plots, which needs nothing but a browser: no network, no server.

    Args:
        runs: one for all the details and a recommendation; several to compare.
        replays: of the first run, to show what other strategies would have done.
        advance: called with 1 when a run is done.

    Raises:
        HistoryError: a run has no finite norm.
        OSError: the page cannot be written.
    """
    from plotly.offline import get_plotlyjs

    described = []
    for run in runs:
        described.append(describe_run(run))
        if advance is not None:
            advance(1)
    title = title or " · ".join(Path(run.name).name for run in runs)
    data = {
        "title": title,
        "version": __version__,
        "runs": described,
        "replays": [_replay(runs[0], replay) for replay in replays],
    }
    template = (files("distclip.monitor") / "page.html").read_text("utf-8")
    encoded = orjson.dumps(data).decode().replace("<", "\\u003c")  # no </script> within
    for name, value in (("title", html.escape(title)), ("data", encoded), ("plotly", get_plotlyjs())):
        template = template.replace("{{" + name + "}}", value, 1)
    Path(path).write_text(template, "utf-8")


def describe_run(run: Run) -> dict[str, Any]:
    """All that the page shows of a run, as plain values; as small for a million steps as for a thousand."""
    run.require_finite()
    finite = run.norm[np.isfinite(run.norm)]
    positive = finite[finite > 0]
    single = np.isfinite(run.threshold) & run.whole
    p99 = float(np.percentile(finite, 99))
    try:
        advised = _recommendation(run, recommend(run))
    except HistoryError:  # too few steps
        advised = None
    starts, share = rate(run.step, run.clipped)
    return {
        "name": run.name,
        "strategy": run.strategy,
        "world_size": run.world_size,
        "stats": {
            "steps": len(run),
            "first": int(run.step[0]),
            "last": int(run.step[-1]),
            "median": float(np.median(finite)),
            "p99": p99,
            "high": float(finite.max()),
            "clip_rate": run.clip_rate,
            "skipped": int(run.skipped.sum()),
            "nonfinite": int(run.nonfinite.sum()),
            "threshold": float(np.median(run.threshold[single])) if single.any() else None,
        },
        "norm": _series(envelope(run.step, np.where(run.norm > 0, run.norm, np.nan))),
        "threshold": _threshold(run.step, np.where(single, run.threshold, np.nan)),
        "coefficient": _series(envelope(run.step, run.coefficient, 600)),
        "clip_rate": {"x": starts.tolist(), "y": _short(share)},
        "nonfinite": _some(run.step[run.nonfinite]),
        "histogram": _histogram(positive),
        "heat": heat_of(run),
        "loss": _series(envelope(run.step, run.loss, 600)) if np.isfinite(run.loss).any() else None,
        "recommendation": advised,
    }


def _recommendation(run: Run, advised: Recommendation) -> dict[str, Any]:
    largest = sorted(advised.spikes, key=lambda spike: -spike.ratio)[:SPIKES_SHOWN]
    spikes = []
    for spike in largest:
        i = int(np.searchsorted(run.step, spike.step))
        fate = "skipped" if run.skipped[i] else "clipped" if run.clipped[i] else "let through"
        spikes.append(
            {
                "step": spike.step,
                "norm": spike.norm,
                "ratio": spike.ratio,
                "steps": spike.steps,
                "coefficient": float(run.coefficient[i]),
                "fate": fate,
            }
        )
    return advised.to_dict() | {"spikes": spikes, "spike_count": len(advised.spikes)}


def _replay(run: Run, replay: Tally) -> dict[str, Any]:
    return {
        "name": replay.name,
        "summary": replay.summary(),
        **_threshold(run.step, replay.threshold),
    }


def _threshold(step: NDArray[np.int64], values: Floats) -> dict[str, Any]:
    """A threshold that never changes is two points."""
    if len(values) > 2 and bool((values == values[0]).all()):
        step, values = step[[0, -1]], values[[0, -1]]
    line = envelope(step, values)
    return {"x": line.step.tolist(), "y": _short(line.middle)}


def _series(line: Envelope) -> dict[str, Any]:
    series = {"x": line.step.tolist(), "middle": _short(line.middle), "exact": line.exact}
    return series if line.exact else series | {"low": _short(line.low), "high": _short(line.high)}


def _histogram(positive: Floats) -> dict[str, Any]:
    logs = np.log10(positive)
    low, high = float(logs.min()), float(logs.max())
    pad = max(0.02, 0.02 * (high - low))
    counts, edges = np.histogram(logs, bins=60, range=(low - pad, high + pad))
    ticks = [m * 10.0**e for e in range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low - pad <= np.log10(t) <= high + pad]
    while len(ticks) > 9:
        ticks = ticks[::2] if len(ticks) < 20 else ticks[::3]
    return {
        "x": _short((edges[:-1] + edges[1:]) / 2),
        "y": counts.tolist(),
        "width": float(edges[1] - edges[0]),
        "ticks": ticks or [float(10 ** ((low + high) / 2))],
    }


def _some(steps: NDArray[np.int64]) -> list[int]:
    chosen: list[int] = steps[:: max(1, len(steps) // MARKS_SHOWN)].tolist()
    return chosen


def _short(values: Floats) -> list[float | None]:
    """Six digits are more than a screen shows. JSON has no NaN: null."""
    return [float(f"{value:.6g}") if value == value else None for value in values.tolist()]
