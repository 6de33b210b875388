"""Advice about the threshold, once per run, from the reports of the run itself."""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from distclip.apply.stepped import AfterStep
from distclip.decide.report import ClipReport
from distclip.decide.transfer import Transfer
from distclip.torch_private import grad_scaler

logger = logging.getLogger("distclip")

FIRST_LOOK = 10
"""Steps until the norms are first looked at: soon enough for a loop that clips nothing at all."""
BLOCK = 100
"""Steps between two later looks."""
OFTEN, OFTEN_STEPS = 0.95, 200
NEVER_STEPS = 1000
SKIPS, NONFINITE = 5, 20
"""So many steps in a row that were skipped as spikes, or whose norm was not finite, are no accident. (Loss
scaling begins with a few that are not.)"""
SCALED = 250
"""Norms so many thresholds high, in every one of the first steps, are those of a scaled loss."""
EQUAL = 1e-5
"""Norms that agree so well are no accident: clipping to 1 leaves 1e-6 of difference. (Norms of gradients that
never change have none at all.)"""
ORDINARY = 0.99
"""The share of ordinary steps that a suggested threshold leaves alone."""
MOSTLY = 0.9
"""The least share of the steps that are ordinary."""
SPIKE_SIGMAS, SPIKE_FACTOR = 6.0, 2.0
"""A spike is as many robust deviations of log(norm) above the median, and at least this factor."""


def warn_alike(message: str) -> None:
    """Advice that a single process gets as a warning. Where there are others it goes to the log of rank 0:
    a warning that is made an error would raise on one rank only, and the others would wait for it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if is_main_rank():
            logger.warning(message)
    else:
        warnings.warn(message, UserWarning, stacklevel=4)


class Advice:
    """Watches the reports of a run, and logs what looks like a mistake: each mistake once, on rank 0.

    - All norms of the first steps are exactly 0: clipping before ``backward``, or after ``zero_grad``.
    - All of the first steps are clipped, and a GradScaler lives that has unscaled nothing; or their norms are
      far above the threshold: the gradients are scaled.
    - More than 95 % of the last 200 steps were clipped: the threshold is too low. With the threshold that
      ``distclip recommend`` gives for these steps.
    - Never clipped in 1000 steps, by a threshold that does not adapt. With the same.
    - Five steps in a row were skipped though their norms were finite, or the norms of 20 in a row were not:
      the loss stands still meanwhile.

    The values are fetched in blocks, in the background: no step waits for the device, and what a block says
    may be said a few steps later. Nothing is fetched any more once there is nothing left to find. It logs (to
    the logger ``distclip``) and does not warn: a warning that is made an error would raise on one rank only,
    and the others would wait for it.

    Args:
        whole: whether the strategy compares one norm, that of the whole gradient, with one threshold. If
            not, that some parameter is clipped in every step is as it should be, and only the first
            two mistakes are looked for.

    Example:
        >>> advice = Advice(whole=not strategy.per_parameter and len(strategy.groups) == 1)
        >>> advice.observe(report)
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._whole = whole
        self._speaks: bool | None = None  # on rank 0 only, which is known at the first report
        self._pending: list[ClipReport] = []
        self._coming: Transfer | None = None  # a block of them
        self._seen = 0
        self._latest: deque[tuple[float, float, bool]] = deque(maxlen=NEVER_STEPS)
        self._watching = {"zero", "first"} | ({"often", "never"} if whole else set())
        self._skipping = {"skips", "nonfinite"}  # watched to the end of the run
        self._skips = 0  # the latest steps in a row that were skipped; those without a norm do not count
        self._nonfinite = 0  # the latest norms in a row that were not finite

    @property
    def done(self) -> bool:
        """Whether there is nothing left to find about the threshold: only skipped steps are still watched."""
        return not self._watching or self._speaks is False

    def observe(self, report: ClipReport) -> None:
        """Take note of one step. A few tenths of a microsecond; keeps the reports of a block."""
        if self._speaks is False or not (self._watching or self._skipping):
            return
        if report.total_norm.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a CUDA graph: there are no numbers before it is replayed
        if self._speaks is None:
            self._speaks = is_main_rank()
            if not self._speaks:
                return
        self._pending.append(report)
        if self._coming is None and len(self._pending) >= (BLOCK if self._seen else FIRST_LOOK):
            self._coming = self._fetch()
        if self._coming is not None and self._coming.arrived:
            block, self._coming = self._coming.values, None
            self._look(block)

    def _fetch(self) -> Transfer:
        """[4, steps]: norms, thresholds (NaN where there are several), what was clipped, and what skipped."""
        pending, self._pending = self._pending, []
        self._seen += len(pending)
        norms = torch.stack([report.total_norm for report in pending])
        nan = torch.full_like(pending[0].total_norm, math.nan)
        thresholds = (report.threshold for report in pending)
        columns = (
            norms,
            torch.stack([t.to(nan) if t.dim() == 0 else nan for t in thresholds]),
            torch.stack([report.clipped for report in pending]).to(norms),
            torch.stack([report.skipped for report in pending]).to(norms),
        )
        return Transfer(torch.stack(columns))

    def _look(self, block: Tensor) -> None:
        for norm, threshold, clipped, skipped in zip(*block.tolist(), strict=True):
            if math.isfinite(norm):
                self._latest.append((norm, threshold, bool(clipped)))
            self._count(norm, threshold, bool(skipped))
        self._advise()

    def _count(self, norm: float, threshold: float, skipped: bool) -> None:
        self._nonfinite = 0 if math.isfinite(norm) else self._nonfinite + 1
        if math.isfinite(norm) and (skipped or norm > 0):
            self._skips = self._skips + 1 if skipped else 0
        if self._skips >= SKIPS and "skips" in self._skipping:
            self._skipping.discard("skips")
            logger.warning(
                "%d steps in a row were skipped (the norm is %.3g, with a threshold of %.3g): if that goes "
                "on, it is no spike but a new level, and the loss stands still meanwhile. "
                "SkipSpikes(patience=...) says after how many it is learned, forget() learns it now.",
                self._skips, norm, threshold,
            )  # fmt: skip
        if self._nonfinite >= NONFINITE and "nonfinite" in self._skipping:
            self._skipping.discard("nonfinite")
            logger.warning(
                "the norm was NaN or infinite in %d steps in a row: look for the cause "
                "(clipper.find_nonfinite() names parameters and ranks).", self._nonfinite,
            )  # fmt: skip

    def no_gradients(self) -> None:
        """No parameter has any gradient at the first clip, on a rank that holds all of them."""
        if "zero" in self._watching and is_main_rank():
            self._watching.discard("zero")
            logger.warning(
                "no parameter has a gradient at the first clip, so nothing is clipped: clip after backward() "
                "and before optimizer.step() and zero_grad()."
            )

    def no_parameters(self) -> None:
        """There is nothing to clip, on any rank."""
        if "zero" in self._watching and is_main_rank():
            self._watching.discard("zero")
            logger.warning(
                "the clipper has no parameter that trains, so nothing is clipped: the list that it was made "
                "from is empty (filtered by `p.grad is not None` before the first backward pass, say), or "
                "all of its parameters are frozen. Pass the model, distclip.Clipper(model, strategy)."
            )

    def _advise_at_first(self) -> None:
        """Of the first steps: what somebody else has done to the gradients, or has not."""
        first = list(self._latest)[:FIRST_LOOK]
        if len(first) < FIRST_LOOK:
            return
        self._watching.discard("first")
        ratios = [norm / threshold if threshold > 0 else 0.0 for norm, threshold, _ in first]
        smallest, largest = min(n for n, _, _ in first), max(n for n, _, _ in first)
        if self._whole and min(ratios) >= SCALED:
            logger.warning(
                "each of the first %d gradient norms was more than %d times the threshold (median %.3g, "
                "threshold %.3g). If a GradScaler scales the loss, these are the norms of scaled gradients: "
                "call clipper.step(optimizer, scaler), or scaler.unscale_(optimizer) before clipper.clip(). "
                "If not, the threshold is far too low.", FIRST_LOOK, SCALED, _median(first), first[-1][1],
            )  # fmt: skip
        elif all(clipped for _, _, clipped in first) and _forgotten_scaler():
            logger.warning(
                "each of the first %d steps was clipped (median norm %.3g), and there is a GradScaler that "
                "has scaled a loss and unscaled nothing: these seem to be the norms of scaled gradients. "
                "Call clipper.step(optimizer, scaler), or scaler.unscale_(optimizer) before clipper.clip().",
                FIRST_LOOK, _median(first),
            )  # fmt: skip
        elif (
            self._whole
            and smallest > 0
            and largest - smallest <= EQUAL * largest
            and len({n for n, _, _ in first}) > 2
        ):
            logger.warning(
                "the first %d gradient norms were all %.6g: it seems that something else has clipped the "
                "gradients to that before (a left-over clip_grad_norm_, say, or max_grad_norm of a trainer), "
                "so that neither reports nor adaptive thresholds see their real norms. Delete that line.",
                FIRST_LOOK, largest,
            )  # fmt: skip

    def _advise(self) -> None:
        if "first" in self._watching:
            self._advise_at_first()
        if "zero" in self._watching and self._latest:
            self._watching.discard("zero")
            if all(norm == 0 for norm, _, _ in self._latest):
                logger.warning(
                    "the gradient norm was exactly 0 in all of the first %d steps: there are no gradients. "
                    "Clip after backward() and before optimizer.step() and zero_grad().",
                    len(self._latest),
                )
                self._watching -= {"often", "never"}
        latest = list(self._latest)[-OFTEN_STEPS:]
        if "often" in self._watching and len(latest) == OFTEN_STEPS:
            share = sum(clipped for _, _, clipped in latest) / OFTEN_STEPS
            if share > OFTEN:
                self._watching -= {"often", "never"}
                logger.warning(
                    "%.0f %% of the last %d steps were clipped (threshold %.3g, median norm %.3g): the "
                    "threshold is too low to tell spikes from ordinary steps, and acts as a smaller "
                    "learning rate. For these steps `distclip recommend` gives max_norm=%g.",
                    100 * share, OFTEN_STEPS, latest[-1][1], _median(latest), _suggested(latest),
                )  # fmt: skip
        if "never" in self._watching and len(self._latest) == NEVER_STEPS:
            thresholds = {threshold for _, threshold, _ in self._latest}
            clips = any(clipped for _, _, clipped in self._latest)
            if not clips and len(thresholds) == 1 and math.isfinite(min(thresholds)):
                logger.warning(
                    "no step was clipped in %d (threshold %.3g, largest norm %.3g): the threshold would let "
                    "a spike through. For these steps `distclip recommend` gives max_norm=%g.",
                    NEVER_STEPS, min(thresholds), max(latest_[0] for latest_ in self._latest),
                    _suggested(self._latest),
                )  # fmt: skip
            if clips or len(thresholds) > 1 or not math.isinf(min(thresholds)):
                self._watching.discard("never")


def _forgotten_scaler() -> bool:
    """Whether a GradScaler has scaled losses since its last update, and no gradients have been unscaled for
    it. (Found by the garbage collector: tens of milliseconds, once.)"""
    if not any(map(_forgotten, gc.get_objects())):
        return False
    gc.collect()  # it may be that of a training long ended, which nobody has cleared away
    return any(map(_forgotten, gc.get_objects()))


def _forgotten(scaler: Any) -> bool:
    if not issubclass(type(scaler), GradScaler):
        return False
    if not grad_scaler.is_on(scaler) or grad_scaler.scale_of(scaler) is None:
        return False
    states = grad_scaler.states(scaler)
    return not isinstance(states, AfterStep) and not states


def suggest_max_norm(norms: Tensor) -> float:
    """A threshold above 99 % of the ordinary norms and below what stands out from them.

    Norms are ordinary up to ``median · max(2, exp(6σ))``, where σ is the robust deviation of their
    logarithms (1.4826 times the median absolute one); all of them are, if that would leave out a tenth.
    The 99th percentile of these, linear between neighbours, is rounded up to two digits.

    Args:
        norms: [steps], any float dtype. Zeros and what is not finite do not count.

    Raises:
        ValueError: no norm is positive and finite.
    """
    positive = norms[torch.isfinite(norms) & (norms > 0)].double()
    if positive.numel() == 0:
        raise ValueError("no norm is positive and finite: there is nothing to choose a threshold by")
    logs = positive.log().sort().values
    median = _quantile(logs, 0.5)
    spread = 1.4826 * _quantile((logs - median).abs().sort().values, 0.5)
    bound = median + max(math.log(SPIKE_FACTOR), SPIKE_SIGMAS * spread)
    ordinary = logs[logs <= bound]
    if ordinary.numel() < MOSTLY * logs.numel():  # what is so frequent is no exception
        ordinary = logs
    return round_up(math.exp(_quantile(ordinary, ORDINARY)))


def round_up(value: float, digits: int = 2) -> float:
    """To so many significant digits, upwards: 0.4213 → 0.43."""
    unit = digits - 1 - math.floor(math.log10(value))
    scaled = math.ceil(round(value * 10.0**unit, 6))
    return float(f"{scaled}e{-unit}")


def is_main_rank() -> bool:
    """Whether this process is the one that talks: rank 0, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _quantile(ordered: Tensor, q: float) -> float:
    rank = q * (ordered.numel() - 1)
    low = ordered[math.floor(rank)].item()
    return low + (ordered[math.ceil(rank)].item() - low) * (rank % 1)


def _median(latest: list[tuple[float, float, bool]]) -> float:
    return sorted(norm for norm, _, _ in latest)[len(latest) // 2]


def _suggested(latest: deque[tuple[float, float, bool]] | list[tuple[float, float, bool]]) -> float:
    norms = torch.tensor([norm for norm, _, _ in latest], dtype=torch.float64, device="cpu")
    return suggest_max_norm(norms) if bool((norms > 0).any()) else 0.0
