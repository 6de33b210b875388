"""Check the installation, the environment, and what histories say about the usual mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from distclip.inspection.advice import NEVER_STEPS, OFTEN
from distclip.inspection.installation import Finding, examine_installation
from distclip.monitor.recommendation import Recommendation, recommend
from distclip.monitor.run import HistoryError, Run

__all__ = ["Finding", "examine_installation", "examine_runs"]


def examine_runs(runs: Sequence[Run]) -> list[Finding]:
    """The usual mistakes, in each run and between runs of different world size."""
    found = [finding for run in runs for finding in _examine(run)]
    for i, one in enumerate(runs):
        for other in runs[i + 1 :]:
            if one.world_size and other.world_size and one.world_size != other.world_size:
                found.append(_compare(one, other))
    return found


def _examine(run: Run) -> list[Finding]:
    name, found = run.name, list[Finding]()
    if run.torn:
        found.append(Finding("note", name, "the last line is torn (the run was killed); it is left out"))
    found += _nonfinite(run)
    finite = run.norm[np.isfinite(run.norm)]
    if not (finite > 0).any():
        text = "all finite norms are 0: clip after backward() and before zero_grad()"
        return [*found, Finding("problem", name, text)] if len(finite) else found
    try:
        advised = recommend(run)
    except HistoryError as error:
        return [*found, Finding("note", name, str(error))]
    try_it = f"`distclip recommend` gives {advised.strategy}"
    thresholds = run.threshold[np.isfinite(run.threshold)]
    if run.whole and run.clip_rate > OFTEN:
        text = f"{run.clip_rate:.0%} of the steps are clipped: the threshold is too low; {try_it}"
        found.append(Finding("problem", name, text))
    elif run.whole and not run.clipped.any() and len(run) >= NEVER_STEPS and not run.skipped.any():
        level: Literal["note", "problem"] = "problem" if advised.spikes else "note"
        text = f"never clipped in {len(run)} steps, with {len(advised.spikes)} spikes among them; {try_it}"
        found.append(Finding(level, name, text))
    elif run.whole and len(thresholds):
        found += _distance(run, float(np.median(thresholds)), advised, try_it)
    if advised.drift > 1.5 and advised.strategy.startswith("Percentile"):
        text = f"the typical norm grows by a factor of {advised.drift:.2g} over the steady phase; {try_it}"
        found.append(Finding("problem" if advised.drift > 4 else "note", name, text))
    if not any(finding.level != "ok" for finding in found):
        text = f"{len(run)} steps, {run.clip_rate:.1%} clipped, median norm {np.median(finite):.3g}"
        found.append(Finding("ok", name, text))
    return found


def _nonfinite(run: Run) -> list[Finding]:
    bad = run.nonfinite
    if not bad.any():
        return []
    padded = np.concatenate(([False], bad, [False])).astype(np.int8)
    starts, ends = np.nonzero(np.diff(padded) == 1)[0], np.nonzero(np.diff(padded) == -1)[0]
    longest = int(np.argmax(ends - starts))
    length, first = int(ends[longest] - starts[longest]), int(run.step[starts[longest]])
    text = (
        f"{int(bad.sum())} of {len(run)} norms are NaN or infinite, "
        f"the longest burst {length} from step {first}"
    )
    if length >= 5 or bad.mean() > 0.01:
        return [
            Finding(
                "problem", run.name, f"{text}: lower the loss scale or learning rate, or check the data there"
            )
        ]
    return [Finding("note", run.name, text)]


def _distance(run: Run, threshold: float, advised: Recommendation, try_it: str) -> list[Finding]:
    ratio = threshold / advised.max_norm
    if 0.1 < ratio < 10:
        return []
    side = "above" if ratio > 1 else "below"
    text = f"the threshold {threshold:.3g} is far {side} the data, 99 % below {advised.percentiles['99']:.3g}"
    return [Finding("problem", run.name, f"{text}; {try_it}")]


def _compare(one: Run, other: Run) -> Finding:
    """The first norms of one seed should not depend on how many ranks there are."""
    common, i, j = np.intersect1d(one.step, other.step, return_indices=True)
    topic = f"{one.world_size} and {other.world_size} ranks"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (other.norm[j] / one.norm[i])[:20]
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    if len(ratios) < 3:
        return Finding(
            "note", topic, f"{len(common)} steps in common: too few to compare {one.name} and {other.name}"
        )
    ratio = float(np.exp(np.median(np.log(ratios))))
    if abs(math.log(ratio)) < 0.02:
        return Finding(
            "ok", topic, f"the norms of the first {len(ratios)} common steps agree ({ratio - 1:+.1%})"
        )
    assert one.world_size is not None
    assert other.world_size is not None
    factor = other.world_size / one.world_size
    reasons = {
        "gradients are summed over the ranks instead of averaged": factor,
        "the batch of a rank stays the same, so the global batch grows and averages out noise": factor**-0.5,
        "norms are of one shard instead of the whole gradient, or replicas are counted several times": factor
        ** 0.5,
        "gradients are divided by the number of ranks twice": 1 / factor,
    }
    close = [text for text, guess in reasons.items() if abs(math.log(ratio / guess)) < 0.1]
    why = (
        close[0]
        if close
        else "other data, seed or batch size; or gradients that some ranks count differently"
    )
    text = (
        f"norms of the first common steps differ by a factor of {ratio:.3g}. Likely: {why}. "
        "Check with clipper.verify()"
    )
    return Finding("problem", topic, text)
