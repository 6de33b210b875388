"""Record what clipping did in every step, without waiting for the device in every step."""

from __future__ import annotations

import atexit
import json
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from distclip._version import __version__
from distclip.decide.report import ClipReport
from distclip.inspection.advice import is_main_rank
from distclip.monitor.journal import Journal
from distclip.strategies._base import Strategy

logger = logging.getLogger("distclip")

FORMAT = 1
KEPT_WHILE_UNWRITABLE = 100_000
"""Steps that are kept in memory while the file cannot be written (the disk is full)."""


class ScalarWriter(Protocol):
    """TensorBoard's ``SummaryWriter``, or what has its ``add_scalar``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


Sink: TypeAlias = ScalarWriter | Callable[[dict[str, Any]], object]


class _Entry(NamedTuple):
    step: int
    report: ClipReport
    threshold: Tensor | None  # 0-dim, a copy
    loss: Tensor | float | None
    lr: float | None
    details: bool  # whether the per-parameter norms are to be kept


class History:
    """The record of a run: one line of JSON for every step, and whatever else wants the numbers.

    Only rank 0 records; call it on every rank all the same. A step costs a few microseconds and no host
    synchronisation: values are fetched from the device, and written, a block at a time, in one transfer.
    ``distclip recommend``, ``replay``, ``report`` and ``watch`` read the file, also while it grows.

    A killed process loses the block that it had not written yet; a torn last line is mended at restart. A
    restarted run continues the file: give the history the step it resumes at, with ``load_state_dict`` or
    ``record(step=...)``, and no step is there twice (the lines of steps that are taken again move to
    ``<path>.replaced``). Without, it goes on after the last step in the file.

    Args:
        path: the file, ``run.jsonl`` say, or None to feed ``to`` only (without which it does nothing).
        to: where each step goes besides: TensorBoard's ``SummaryWriter``, or a callable that takes a dict
            (``wandb.log``, ``accelerator.log``, ``lambda d: mlflow.log_metrics(d, step=d["step"])``), or
            several. They are called when a block is written, with plain numbers.
        strategy: the clipper's, to be named in the file.
        param_norms_every: keep per-parameter norms of every k-th step, if the report has them (see
            :attr:`wants_param_norms`). 1 for each, which a replay of per-parameter strategies needs; 0 for
            none.
        module_depth: None keeps each parameter's norm; d keeps that of each module, named by the first d
            parts of the parameters' names: less to write for large models.
        block: write after so many steps, ...
        seconds: ... or when the last block is so long ago.

    Raises:
        ValueError: an argument is not in its range, or the file holds something else than a history.
        OSError: on rank 0, from the constructor or the first ``record``: the file cannot be opened.

    Example:
        >>> history = distclip.History("run.jsonl", strategy=clipper.strategy)
        >>> for batch in batches:
        ...     ...
        ...     report = clipper.clip(param_norms=history.wants_param_norms)
        ...     history.record(report, loss=loss, lr=scheduler.get_last_lr()[0])
        >>> history.close()
    """

    def __init__(
        self,
        path: str | PathLike[str] | None,
        *,
        to: Sink | Iterable[Sink] = (),
        strategy: Strategy | None = None,
        param_norms_every: int = 100,
        module_depth: int | None = None,
        block: int = 100,
        seconds: float = 10.0,
    ) -> None:
        if block < 1 or param_norms_every < 0 or (module_depth is not None and module_depth < 1):
            raise ValueError(
                f"{block=}, {param_norms_every=}, {module_depth=}: expected at least 1, 0 and 1 (or None)"
            )
        self.path = None if path is None else Path(path)
        self._sinks: list[Sink] = list(to) if isinstance(to, Iterable) else [to]
        self._idle = path is None and not self._sinks  # nowhere to go: keeps nothing
        self._strategy = None if strategy is None else written(strategy)
        self._whole = strategy is None or (not strategy.per_parameter and len(strategy.groups) == 1)
        self._every, self._depth = param_norms_every, module_depth
        self._block, self._seconds = block, seconds
        self._pending: list[_Entry] = []
        self._lines: list[bytes] = []  # fetched, and not in the file yet
        self._rewind_to: int | None = None  # the step from which on the file is to be written anew
        self._names: tuple[str, ...] = ()  # of the per-parameter norms last written
        self._calls = 0
        self._step: int | None = None  # last recorded; None: continue after the file's last
        self._written_at = time.monotonic()
        self._head_due = True
        self._main: bool | None = None  # whether this is rank 0, once that is known
        self._journal: Journal | None = None
        if dist.is_available() and dist.is_initialized():
            self._open()
        _close_at_exit(self)

    @property
    def step(self) -> int:
        """The step last recorded; 0 before the first."""
        return self._step or 0

    @property
    def wants_param_norms(self) -> bool:
        """Whether the next step is one whose per-parameter norms are kept: pass it to
        ``clipper.clip(param_norms=...)``. The same on every rank that records every step, also where only
        rank 0 was given a destination: ranks that ask for different norms would wait for each other."""
        return self._every > 0 and self._calls % self._every == 0

    def record(
        self,
        report: ClipReport,
        *,
        step: int | None = None,
        loss: Tensor | float | None = None,
        lr: float | None = None,
    ) -> None:
        """Take note of one step, on every rank.

        Args:
            step: its number; by default one more than the last.
            loss: 0-dim, on any device; it is not waited for. By default the mean that the strategy judged,
                if it did.
            lr: the learning rate of this step.

        Raises:
            ValueError: the loss is not one number.
        """
        details, self._calls = self.wants_param_norms, self._calls + 1
        if loss is None:
            loss = report.loss
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss has shape {tuple(loss.shape)}: expected one number")
            loss = loss.detach()
            loss = loss.to_local() if hasattr(loss, "to_local") else loss
        if self._main is None:
            self._open()
        if step is None:
            step = (self._step or 0) + 1
        elif self._step is not None and step <= self._step:
            self.flush()  # the run went back: first what was recorded before
        self._step = step
        if not self._main or self._idle:
            return
        # A strategy may report a buffer of its own, which the next step changes: the one copy that is made.
        threshold = report.threshold.clone() if report.threshold.dim() == 0 else None
        self._pending.append(_Entry(step, report, threshold, loss, lr, details))
        if len(self._pending) >= self._block or time.monotonic() - self._written_at > self._seconds:
            self.flush()

    def flush(self) -> None:
        """Fetch what is pending, in one transfer, and hand it to the file and the sinks.

        If the file cannot be written now, that is logged, and tried again with the next block.
        """
        pending, self._pending = self._pending, []
        self._written_at = time.monotonic()
        if pending:
            rows = _fetch(pending)
            if self._journal is not None:
                self._write(self._journal, pending, rows)
            for row in rows:
                for sink in self._sinks:
                    _send(sink, row)
        elif self._lines and self._journal is not None:
            self._append(self._journal, None)

    def close(self) -> None:
        """Write what is pending and close the file. A history may also be used in a ``with`` block."""
        self.flush()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._main = None  # who records again opens again

    def __del__(self) -> None:
        if hasattr(self, "_journal"):  # not one whose arguments were wrong
            self.close()

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """To be saved with a checkpoint: the step. Writes what is pending, so that the file reaches it."""
        self.flush()
        return {"step": self.step, "calls": self._calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the step of a checkpoint."""
        self.flush()
        self._step, self._calls = state["step"], state.get("calls", 0)

    def _open(self) -> None:
        self._main = is_main_rank()
        if not self._main or self.path is None:
            return
        self._journal = journal = Journal(self.path)
        if self._step is None:
            self._step = journal.last_step or None
        self._names, self._head_due = (), True

    def _head(self, norm_type: float) -> bytes:
        head: dict[str, Any] = {
            "distclip": __version__,
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            "norm_type": _plain(norm_type),
        }
        if self._strategy is not None:
            head |= {"strategy": self._strategy, "whole": self._whole}
        if self._depth is not None:
            head["module_depth"] = self._depth
        return _line(head)

    def _write(self, journal: Journal, pending: Sequence[_Entry], rows: Sequence[dict[str, Any]]) -> None:
        steps = [entry.step for entry in pending]
        if steps[0] <= journal.last_step:
            self._rewind_to, self._names = steps[0], ()
        if self._head_due:
            self._lines.append(self._head(pending[0].report.norm_type))
            self._head_due = False
        for entry, row in zip(pending, rows, strict=True):
            norms = entry.report._parameter_norms
            if entry.details and norms is not None:
                names, values = entry.report._parameter_names, norms.tolist()
                if self._depth is not None:
                    names, values = by_module(names, values, self._depth, entry.report.norm_type)
                if names != self._names:
                    self._names = names
                    self._lines.append(_line({"names": names}))
                self._lines.append(_text(row, values))
            else:
                self._lines.append(_text(row))
        self._append(journal, steps[-1])

    def _append(self, journal: Journal, last_step: int | None) -> None:
        try:
            if self._rewind_to is not None:
                moved = journal.rewind(self._rewind_to)
                logger.warning(
                    "%s: step %d is recorded again; the %d lines from it on were moved to %s.replaced",
                    self.path, self._rewind_to, moved, self.path,
                )  # fmt: skip
                self._rewind_to = None
            journal.append(b"".join(self._lines), last_step)
            self._lines.clear()
        except OSError as error:
            logger.warning("%s: %s; %d lines are kept in memory", self.path, error, len(self._lines))
            del self._lines[: max(0, len(self._lines) - KEPT_WHILE_UNWRITABLE)]


def written(strategy: Strategy) -> str:
    """A strategy on one line: ``Chain(SkipSpikes(sigma=6.0, …), GlobalNorm(max_norm=1.0, …))``."""
    links = getattr(strategy, "links", None)
    inner = strategy.extra_repr() if links is None else ", ".join(map(written, links))
    return f"{type(strategy).__name__}({inner})"


def by_module(
    names: Sequence[str], norms: Sequence[float], depth: int, norm_type: float
) -> tuple[tuple[str, ...], list[float]]:
    """Norms of modules, named by the first ``depth`` parts of their parameters' names."""
    sums: dict[str, float] = {}
    for name, norm in zip(names, norms, strict=True):
        parts = name.split(".")
        module = ".".join(parts[: min(depth, max(1, len(parts) - 1))])
        before = sums.get(module, 0.0)
        sums[module] = max(before, norm) if math.isinf(norm_type) else before + norm**norm_type
    whole = 1.0 if math.isinf(norm_type) else 1 / norm_type
    return tuple(sums), [total**whole for total in sums.values()]


def _fetch(pending: Sequence[_Entry]) -> list[dict[str, Any]]:
    """The pending steps as plain numbers: one transfer from each device that any value lives on."""
    columns: dict[str, list[Any]] = {
        "total_norm": [e.report.total_norm for e in pending],
        "threshold": [e.threshold for e in pending],
        "coefficient": [e.report.coefficient for e in pending],
        "clipped": [e.report.clipped for e in pending],
        "skipped": [e.report.skipped for e in pending],
        "nonfinite": [e.report.nonfinite for e in pending],
        "loss": [e.loss for e in pending],
    }
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[tuple[str, int]]]] = {}
    for name, values in columns.items():
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                tensors, places = kinds.setdefault((value.device, value.dtype), ([], []))
                tensors.append(value if value.dim() == 0 else value.reshape(()))
                places.append((name, i))
    devices: dict[torch.device, tuple[list[Tensor], list[tuple[str, int]]]] = {}
    for (device, _), (tensors, places) in kinds.items():
        parts, where = devices.setdefault(device, ([], []))
        parts.append(torch.stack(tensors).double())
        where.extend(places)
    for parts, where in devices.values():
        for (name, i), value in zip(where, torch.cat(parts).tolist(), strict=True):
            columns[name][i] = value
    rows = []
    for i, entry in enumerate(pending):
        row: dict[str, Any] = {"step": entry.step, "total_norm": columns["total_norm"][i]}
        row["threshold"], row["coefficient"] = columns["threshold"][i], columns["coefficient"][i]
        row["clipped"] = bool(columns["clipped"][i])
        row["skipped"] = bool(columns["skipped"][i])
        row["nonfinite"] = bool(columns["nonfinite"][i])
        row["loss"], row["lr"] = columns["loss"][i], entry.lr
        rows.append({k: v for k, v in row.items() if v is not None})
    return rows


def _text(row: dict[str, Any], param_norms: Sequence[float] | None = None) -> bytes:
    """A row as one line. What is usual is left out: flags that are false, a coefficient of 1."""
    parts = [f'{{"step":{row["step"]},"total_norm":{_number(row["total_norm"])}']
    if "threshold" in row:
        parts.append(f'"threshold":{_number(row["threshold"])}')
    if row["coefficient"] != 1:
        parts.append(f'"coefficient":{_number(row["coefficient"])}')
    parts.extend(f'"{flag}":true' for flag in ("clipped", "skipped", "nonfinite") if row[flag])
    parts.extend(f'"{name}":{_number(row[name])}' for name in ("loss", "lr") if name in row)
    if param_norms is not None:
        parts.append(f'"param_norms":[{",".join(map(_number, param_norms))}]')
    return (",".join(parts) + "}\n").encode()


def _number(value: float) -> str:
    # Nine digits tell any two float32 apart: read back and rounded to float32, the value is the same.
    return f"{value:.9g}" if math.isfinite(value) else f'"{value}"'


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _send(sink: Sink, row: dict[str, Any]) -> None:
    if callable(sink):
        sink(dict(row))
        return
    for name, value in row.items():
        if name != "step":
            sink.add_scalar(f"clip/{name}", float(value), row["step"])


def _close_at_exit(history: History) -> None:
    reference = weakref.ref(history)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)
