"""What a strategy would have done in a run that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distclip.apply.change import OnNonfinite, resolve
from distclip.decide.decision import Scale
from distclip.decide.norms import Norms, grouped
from distclip.decide.parameter_info import ParameterInfo
from distclip.decide.report import ClipReport
from distclip.monitor.history import written
from distclip.monitor.run import Floats, HistoryError, Run, read
from distclip.strategies._base import Strategy
from distclip.strategies.chain import Chain
from distclip.strategies.global_norm import GlobalNorm
from distclip.strategies.skip_spikes import SkipSpikes


def replay(
    history: Run | str | Path, strategy: Strategy, *, on_nonfinite: OnNonfinite = "skip"
) -> Iterator[tuple[int, ClipReport]]:
    """Feed the recorded norms to a strategy: for each step, its number and the report of it.

    Thresholds and decisions are, bit for bit, those of a live run with these norms. (What the run would have
    become with another strategy, no log can tell: the norms are those of the run that was.) The strategy
    itself is not changed; a copy of it goes on from the state that it has.

    Strategies that work by parameter or by group need the per-parameter norms of every step
    (``History(..., param_norms_every=1)``). Group norms are put together from these, which rounds in the
    last digit.

    Args:
        on_nonfinite: as of :class:`distclip.Clipper`; "raise" as there.

    Raises:
        HistoryError: the run lacks what the strategy needs: per-parameter norms, or norms of its p.

    Example:
        >>> for step, report in distclip.monitor.replay("run.jsonl", distclip.ZClip()):
        ...     print(step, report)
    """
    run = history if isinstance(history, Run) else read(history)
    require_replayable(run, strategy)
    return _replay(run, deepcopy(strategy), on_nonfinite)


def require_replayable(run: Run, strategy: Strategy) -> None:
    """Raises:
    HistoryError: the run lacks what the strategy needs.
    """
    if strategy.norm_type != run.norm_type:
        raise HistoryError(
            f"{run.name}: {type(strategy).__name__} needs norms of p = {strategy.norm_type:g}, and "
            f"those of p = {run.norm_type:g} were recorded"
        )
    if needs_details(strategy) and run.by_module:
        raise HistoryError(
            f"{run.name}: {type(strategy).__name__} needs the norm of each parameter, and those of modules "
            "were recorded: record without module_depth"
        )
    if needs_details(strategy) and not np.array_equal(run.param_steps, run.step):
        raise HistoryError(
            f"{run.name}: {type(strategy).__name__} needs the norms of each parameter in every step, and "
            f"{len(run.param_steps)} of {len(run)} steps have them: record with "
            "History(..., param_norms_every=1) and clip(param_norms=history.wants_param_norms)"
        )
    clamps_between = isinstance(strategy, Chain) and (strategy.num_extra or strategy.measures_again)
    if strategy.per_unit or clamps_between:
        lacks = "the norms of the weights" if strategy.per_unit else "the norm that its Value leaves"
        raise HistoryError(f"{run.name}: {type(strategy).__name__} needs {lacks}, which no history has")
    if strategy.uses_loss and np.isnan(run.loss).all():
        raise HistoryError(
            f"{run.name}: {type(strategy).__name__} judges the loss, which was not recorded: "
            "history.record(report, loss=loss)"
        )


def needs_details(strategy: Strategy) -> bool:
    return strategy.per_parameter or len(strategy.groups) > 1


def _replay(run: Run, strategy: Strategy, on_nonfinite: OnNonfinite) -> Iterator[tuple[int, ClipReport]]:
    strategy.prepare([ParameterInfo(name, torch.Size()) for name in run.param_names])
    totals = torch.from_numpy(run.norm.astype(np.float32))
    slots = torch.from_numpy(run.param_norms) if needs_details(strategy) else totals.unsqueeze(1)
    losses = torch.from_numpy(run.loss.astype(np.float32)) if strategy.uses_loss else None
    labels = run.param_names if strategy.per_parameter else strategy.groups
    index = None
    if not strategy.per_parameter and len(strategy.groups) > 1:
        index = torch.tensor(
            [strategy.group_of(ParameterInfo(n, torch.Size())) for n in run.param_names], dtype=torch.int64
        )
    for i, (step, total) in enumerate(zip(run.step.tolist(), totals.unbind(), strict=True)):
        row = slots[i] if index is None else grouped(slots[i], index, len(strategy.groups), run.norm_type)
        loss = None if losses is None else losses[i]
        norms = Norms(total, row, run.norm_type, labels, loss=loss)
        report = resolve(strategy.decide(norms), norms, on_nonfinite).report
        if strategy.per_parameter:
            report = replace(report, _parameter_norms=row, _parameter_names=run.param_names)
        yield step, report


@dataclass(frozen=True, eq=False)
class Tally:
    """A replay as columns, [steps] each: what :class:`Run` has of the live run."""

    name: str
    threshold: Floats  # NaN where every parameter has its own
    coefficient: Floats
    clipped: NDArray[np.bool_]
    skipped: NDArray[np.bool_]

    def summary(self) -> dict[str, float | int | str]:
        """Rates are shares of all steps. The mean coefficient is over the steps that were clipped."""
        known = self.threshold[np.isfinite(self.threshold)]
        return {
            "strategy": self.name,
            "clip_rate": float(self.clipped.mean()),
            "mean_coefficient": float(np.nanmean(self.coefficient[self.clipped]))
            if (self.clipped & ~np.isnan(self.coefficient)).any()
            else 1.0,
            "threshold_median": float(np.median(known)) if known.size else float("nan"),
            "threshold_min": float(known.min()) if known.size else float("nan"),
            "threshold_max": float(known.max()) if known.size else float("nan"),
            "skipped": int(self.skipped.sum()),
        }


def tally(
    run: Run, strategy: Strategy, name: str | None = None, *, advance: Callable[[int], object] | None = None
) -> Tally:
    """Replay a whole run. ``advance``: called with the number of steps done since the last call.

    Raises:
        HistoryError: the run lacks what the strategy needs.
    """
    name = name or written(strategy)
    require_replayable(run, strategy)
    if is_stateless(strategy):
        totals = torch.from_numpy(run.norm.astype(np.float32))
        decision = strategy.decide(Norms(totals, totals.unsqueeze(1), run.norm_type))
        assert isinstance(decision, Scale)
        finite = torch.isfinite(totals)
        coefficient = torch.where(finite, decision.coefficient, 1.0)
        if advance is not None:
            advance(len(run))
        return Tally(
            name,
            decision.threshold.double().numpy(),
            coefficient.double().numpy(),
            (coefficient != 1).numpy(),
            (~finite).numpy(),
        )
    rows: list[tuple[Tensor, ...]] = []
    blocks: list[Floats] = []

    def gather() -> None:
        columns = [torch.stack(column).double() for column in zip(*rows, strict=True)]
        blocks.append(torch.stack(columns).numpy())
        rows.clear()

    nothing = torch.tensor(float("nan"), dtype=torch.float32)
    for _, report in replay(run, strategy):
        threshold = report.threshold.clone() if report.threshold.dim() == 0 else nothing
        rows.append((threshold, report.coefficient, report.clipped, report.skipped))
        if len(rows) == 1000:
            gather()
            if advance is not None:
                advance(1000)
    if rows:
        if advance is not None:
            advance(len(rows))
        gather()
    threshold_, coefficient_, clipped, skipped = np.concatenate(blocks, axis=1)
    return Tally(name, threshold_, coefficient_, clipped != 0, skipped != 0)


def differences(run: Run) -> list[str]:
    """Where a replay of an adaptive strategy differs from what 0.1.0 did in the run, each a sentence."""
    found = []
    zeros = int((run.norm == 0).sum())
    if zeros:
        found.append(
            f"{zeros} norms are 0, which teach nothing since 0.2: in a run with 0.1.0 Percentile, ZClip and "
            "SkipSpikes learned from them, and their thresholds were lower than in a replay"
        )
    longest = _longest(run.skipped & np.isfinite(run.norm) & (run.norm > 0))
    patience = SkipSpikes().patience
    if longest > patience:
        found.append(
            f"{longest} steps in a row were skipped, and since 0.2 SkipSpikes skips no more than "
            f"{patience=}: after them a replay goes on from another history than the run did"
        )
    return found


def _longest(flags: NDArray[np.bool_]) -> int:
    """How many in a row are true, at most."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def is_stateless(strategy: Strategy) -> bool:
    """Whether each step's decision follows from its total norm alone, element by element."""
    return type(strategy) is GlobalNorm and not callable(strategy.max_norm)
