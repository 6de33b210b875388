"""Choose a threshold and a strategy from the norms of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distclip.inspection.advice import SPIKE_FACTOR, SPIKE_SIGMAS, round_up, suggest_max_norm
from distclip.monitor.replaying import tally
from distclip.monitor.run import Floats, HistoryError, Run
from distclip.strategies import Percentile

LEAST_STEPS = 20
FEW_STEPS = 300
DRIFT = math.log(1.5)
"""The change of the typical norm, over the steady phase, from which on a fixed threshold goes stale."""
SKIPPED_FROM = 10.0
"""Spikes this many times their surroundings are worth leaving out instead of scaling down."""
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True)
class Spike:
    """A step whose norm stands out; consecutive ones are one spike, and this is its highest.

    Attributes:
        ratio: of its norm to the typical norm around it.
        steps: how many steps it lasts.
    """

    step: int
    norm: float
    ratio: float
    steps: int


@dataclass(frozen=True)
class Recommendation:
    """A threshold and a strategy for a run, and why.

    Attributes:
        max_norm: what ``GlobalNorm`` would be given.
        strategy: the strategy to use, as a Python expression.
        code: a line to paste.
        expected_clip_rate: the share of steady steps that it would clip (skipped ones included).
        warm_up_end: the last step of the warm-up; None if there is none.
        settled: whether there is a steady phase at all.
        drift: the factor by which the typical norm changes over the steady phase.
        percentiles: of the steady norms.
        warm_up_median: None without a warm-up.
        reasons: in words, each a sentence or two.
    """

    max_norm: float
    strategy: str
    code: str
    expected_clip_rate: float
    steps: int
    nonfinite: int
    warm_up_end: int | None
    settled: bool
    drift: float
    percentiles: dict[str, float]
    warm_up_median: float | None
    spikes: tuple[Spike, ...]
    spike_rate: float
    observed_clip_rate: float
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recommend(run: Run) -> Recommendation:
    """What the norms of a run say about the threshold to clip at.

    Clipping is for the exceptions: the threshold goes above 99 % of the ordinary steps of the steady phase,
    and below what stands out from them. The steady phase is where the typical norm has settled on a trend;
    a spike is a norm more than 6 robust deviations (of the logarithm), and at least twice, above the typical
    norm around it. If the typical norm drifts by more than half, a threshold that follows it is recommended;
    if there are rare spikes of ten times the norm and more, to leave those steps out.

    Raises:
        HistoryError: fewer than 20 norms are finite and positive.
    """
    run.require_finite()
    good = np.isfinite(run.norm) & (run.norm > 0)
    if good.sum() < LEAST_STEPS:
        raise HistoryError(
            f"{run.name}: {int(good.sum())} finite norms: expected {LEAST_STEPS} at least, better {FEW_STEPS}"
        )
    steps, norms = run.step[good], run.norm[good]
    trend = _Trend(np.log(norms))
    steady = slice(trend.start, None)
    residual, spread = trend.residual[steady], trend.spread
    is_spike = residual > max(math.log(SPIKE_FACTOR), SPIKE_SIGMAS * spread)
    spikes = _episodes(steps[steady], norms[steady], np.exp(residual), is_spike)
    calm = norms[steady]
    now = calm[-max(LEAST_STEPS, len(calm) // 4) :] if trend.drifts else calm
    max_norm = suggest_max_norm(torch.from_numpy(np.ascontiguousarray(now)))

    strategy, skips = f"GlobalNorm({max_norm:g})", False
    rate = float((calm > max_norm).mean())
    if trend.drifts:
        strategy, rate = _adaptive(run, trend, residual[~is_spike], norms)
    elif _rare_and_large(spikes, is_spike):
        strategy, skips = f"Chain(SkipSpikes(), {strategy})", True
    prefixed = strategy
    for name in ("GlobalNorm", "Percentile", "Chain", "SkipSpikes"):
        prefixed = prefixed.replace(f"{name}(", f"distclip.{name}(")
    return Recommendation(
        max_norm=max_norm,
        strategy=strategy,
        code=f"clipper = distclip.Clipper(model, {prefixed})",
        expected_clip_rate=rate,
        steps=len(run),
        nonfinite=int((~np.isfinite(run.norm)).sum()),
        warm_up_end=int(steps[trend.start - 1]) if trend.start else None,
        settled=trend.settled,
        drift=math.exp(trend.change),
        percentiles={
            f"{q:g}": float(v) for q, v in zip(PERCENTILES, np.percentile(calm, PERCENTILES), strict=True)
        },
        warm_up_median=float(np.median(norms[: trend.start])) if trend.start else None,
        spikes=spikes,
        spike_rate=float(is_spike.mean()),
        observed_clip_rate=run.clip_rate,
        reasons=tuple(_reasons(run, trend, norms, steps, spikes, max_norm, skips, strategy)),
    )


class _Trend:
    """The typical norm over a run, as medians of blocks: where it settles, and how it moves from there.

    Attributes:
        start: index of the first steady step.
        residual: [steps], log norm above the typical one.
        spread: robust standard deviation of the residuals in the steady phase.
        change: of the typical log norm, from the beginning to the end of the steady phase.
    """

    def __init__(self, logs: Floats) -> None:
        n = len(logs)
        blocks = int(min(100, max(5, n // 20)))
        edges = np.linspace(0, n, blocks + 1).astype(int)
        self.medians = np.array([np.median(logs[a:b]) for a, b in pairwise(edges)])
        centres = (edges[:-1] + edges[1:] - 1) / 2
        within = np.concatenate(
            [logs[a:b] - m for (a, b), m in zip(pairwise(edges), self.medians, strict=True)]
        )
        wobble = 1.2533 * _deviation(within) / math.sqrt(n / blocks)  # standard error of a block's median

        tail = slice(int(0.4 * blocks), None)
        slope, level = _line_through(centres[tail], self.medians[tail])
        if abs(slope) * 0.6 * n < max(math.log(1.3), 4 * wobble):  # noise, not to be continued backwards
            slope, level = 0.0, float(np.median(self.medians[tail]))
        off_tail = self.medians[tail] - (level + slope * centres[tail])
        tolerance = max(math.log(1.3), 4 * _deviation(off_tail), 4 * wobble)
        off = np.abs(self.medians - (level + slope * centres)) > tolerance
        first = _first_calm(off)
        # A phase that begins after more than 60 % of the run, or whose level jumps, is no steady one.
        jumps = _deviation(off_tail) > max(math.log(1.5), 5 * wobble)
        self.settled = first <= 0.6 * blocks and not jumps
        first = first if self.settled else int(0.7 * blocks)
        self.start = int(edges[first])
        self.residual = logs - np.interp(np.arange(n), centres, self.medians)
        self.spread = _deviation(self.residual[self.start :])

        slope, _ = _line_through(centres[first:], self.medians[first:])
        self.slope = slope
        self.change = slope * (n - self.start)
        rising = np.sign(self.medians[first:, None] - self.medians[None, first:])
        pairs = rising[np.tril_indices(blocks - first, -1)]
        consistent = abs(pairs.mean()) > 0.5 if pairs.size else False
        self.drifts = bool(abs(self.change) > DRIFT and consistent and n >= FEW_STEPS)


def _deviation(values: Floats) -> float:
    """1.4826 times the median absolute deviation: the standard deviation, where values are normal."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _line_through(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and level of the Theil–Sen line: medians, so that no single block bends it."""
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i]))) if len(i) else 0.0
    return slope, float(np.median(y - slope * x))


def _first_calm(off: NDArray[np.bool_]) -> int:
    """The first block of the steady phase: after the leading ones that are off the trend."""
    needed = 3 if len(off) >= 20 else 1
    for i in range(len(off)):
        if not off[i : i + needed].any():
            return i
    return len(off)


def _episodes(
    steps: NDArray[np.int64], norms: Floats, ratio: Floats, is_spike: NDArray[np.bool_]
) -> tuple[Spike, ...]:
    (where,) = np.nonzero(is_spike)
    if not len(where):
        return ()
    groups = np.split(where, np.nonzero(np.diff(where) > 2)[0] + 1)
    tops = [(group[np.argmax(norms[group])], len(group)) for group in groups]
    return tuple(Spike(int(steps[i]), float(norms[i]), float(ratio[i]), count) for i, count in tops)


def _rare_and_large(spikes: tuple[Spike, ...], is_spike: NDArray[np.bool_]) -> bool:
    large = [spike for spike in spikes if spike.ratio >= SKIPPED_FROM]
    return bool(large) and is_spike.mean() <= 0.01 and max(spike.steps for spike in large) <= 5


def _adaptive(run: Run, trend: _Trend, ordinary: Floats, norms: Floats) -> tuple[str, float]:
    """A percentile of so many norms that the drift within them does not matter, and its clip rate."""
    above = float(np.percentile(ordinary, 99) - np.percentile(ordinary, 95))
    multiplier = max(1.1, math.ceil(20 * math.exp(above)) / 20)
    pace = abs(trend.slope)
    window = 1000 if pace * 1000 < math.log(1.2) else max(50, round_down(math.log(1.2) / pace))
    first = norms[: max(LEAST_STEPS, len(norms) // 20)]
    initial = round_up(float(np.percentile(first, 99)))
    warmup = min(100, window)
    shorter = "" if window == 1000 else f", history={window}" + (f", warmup={warmup}" if warmup < 100 else "")
    text = f"Percentile(95, multiplier={multiplier:g}{shorter}, initial={initial:g})"
    strategy = Percentile(95, multiplier=multiplier, history=window, warmup=warmup, initial=initial)
    part = run.last(3000 + window)
    judged = tally(part, strategy).clipped[min(window, len(part) // 2) :]
    return text, float(judged.mean())


def round_down(value: float) -> int:
    """To one significant digit, downwards: 437 → 400."""
    unit: int = 10 ** int(math.log10(value)) if value >= 1 else 1
    return int(value // unit * unit)


def _reasons(
    run: Run,
    trend: _Trend,
    norms: Floats,
    steps: NDArray[np.int64],
    spikes: tuple[Spike, ...],
    max_norm: float,
    skips: bool,
    strategy: str,
) -> list[str]:
    said = []
    calm = norms[trend.start :]
    if len(norms) < FEW_STEPS:
        said.append(f"Only {len(norms)} steps: take this as a first guess, and look again after {FEW_STEPS}.")
    bad = int((~np.isfinite(run.norm)).sum())
    if bad:
        more = (
            "; so many are no accident of the data: look for their cause first"
            if bad > 0.01 * len(run)
            else ""
        )
        said.append(f"{bad} of {len(run)} steps have a norm that is NaN or infinite (left out here){more}.")
    if not trend.settled:
        said.append(
            "The norm has not settled: no level or trend lasts over the second half of the run. "
            "The numbers are of its last third."
        )
    elif trend.start:
        warm = float(np.median(norms[: trend.start]))
        clipped = float((norms[: trend.start] > max_norm).mean())
        said.append(
            f"The first {trend.start:,} steps are a warm-up (median norm {warm:.3g}, later "
            f"{np.median(calm):.3g}) and were left out. max_norm={max_norm:g} clips {clipped:.0%} of them, "
            + ("which is what protects a young model." if clipped > 0.2 else "so they stay as they are.")
        )
    p50, p95, p99 = np.percentile(calm, (50, 95, 99))
    said.append(f"Typical steps: half are below {p50:.3g}, 95 % below {p95:.3g}, 99 % below {p99:.3g}.")
    if trend.drifts:
        said.append(
            f"The typical norm {'grows' if trend.change > 0 else 'falls'} by a factor of "
            f"{math.exp(abs(trend.change)):.2g} over the steady phase, so a fixed threshold goes stale: one "
            "that follows the latest norms is better. If it has to be fixed, "
            f"GlobalNorm({max_norm:g}) fits the latest steps."
        )
    if spikes:
        top = max(spikes, key=lambda spike: spike.ratio)
        said.append(
            f"{len(spikes)} spike{'s' * (len(spikes) > 1)}, the largest {top.ratio:.3g} times its "
            f"surroundings at step {top.step}. "
            + (
                "They are rare, short and far out: leave those steps out, and scale down what is milder. "
                "(Skipping takes clipper.step(optimizer).)"
                if skips
                else "The threshold cuts every one."
                if not trend.drifts and min(s.norm for s in spikes) > max_norm
                else "They are cut to the level around them."
            )
        )
    elif not trend.drifts:
        said.append(
            f"No spikes and no drift: a fixed threshold above 99 % of the steps, {max_norm:g}, is enough."
        )
    if len(run) and run.clip_rate > 0.95 and run.whole:
        said.append(
            f"This run clipped {run.clip_rate:.1%} of its steps, so every step had the same length: with a "
            "higher threshold the same learning rate takes larger steps. Lower it if the loss gets rougher."
        )
    return said
