"""A growing history in a terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distclip.monitor.run import HistoryError

BARS = "▁▂▃▄▅▆▇█"
KEPT = 20_000
RECENT = 200


@dataclass(frozen=True)
class Seen:
    step: int
    norm: float
    threshold: float
    coefficient: float
    clipped: bool
    skipped: bool
    nonfinite: bool
    loss: float | None


class Tail:
    """Reads what has been appended to a history since the last look; keeps the latest steps.

    Raises:
        HistoryError: the file cannot be read, or a line of it is no JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.steps: deque[Seen] = deque(maxlen=KEPT)
        self.strategy: str | None = None
        self.paces: deque[tuple[float, int]] = deque(maxlen=30)
        self._offset, self._line = 0, 0

    def look(self) -> int:
        """Read on; how many steps are new. A file that is shorter now (the run went back) is read anew."""
        try:
            if self.path.stat().st_size < self._offset:
                self._offset, self._line = 0, 0
                self.steps.clear()
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                new, _, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise HistoryError(f"{self.path}: {error.strerror or error}") from error
        before = len(self.steps)
        if new:
            self._offset += len(new) + 1
            for line in new.split(b"\n"):
                self._line += 1
                self._take(line)
        if self.steps:
            self.paces.append((time.monotonic(), self.steps[-1].step))
        return len(self.steps) - before

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            row = orjson.loads(line)
            if "distclip" in row:
                self.strategy = row.get("strategy")
            elif "total_norm" in row or "grad_norm" in row:
                self._keep(row)
        except (ValueError, TypeError, AttributeError) as error:
            raise HistoryError(f"{self.path}:{self._line}: not a line of a history ({error})") from error

    def _keep(self, row: dict[str, Any]) -> None:
        norm = float(row["total_norm"] if "total_norm" in row else row["grad_norm"])
        loss = row.get("loss")
        self.steps.append(
            Seen(
                step=int(row.get("step", self.steps[-1].step + 1 if self.steps else 1)),
                norm=norm,
                threshold=float(row.get("threshold", math.nan)),
                coefficient=float(row.get("coefficient", 1.0)),
                clipped=bool(row.get("clipped", False)),
                skipped=bool(row.get("skipped", False)),
                nonfinite=bool(row.get("nonfinite", not math.isfinite(norm))),
                loss=None if loss is None else float(loss),
            )
        )

    def pace(self) -> float | None:
        """Steps a second, over the latest looks; None while that is not known."""
        if len(self.paces) < 2 or self.paces[-1][1] <= self.paces[0][1]:
            return None
        (t0, s0), (t1, s1) = self.paces[0], self.paces[-1]
        return (s1 - s0) / max(1e-9, t1 - t0)


def sparkline(values: list[float], width: int) -> str:
    """The latest values on a log scale, the largest of each bin: a spike is always visible."""
    finite = [v for v in values if math.isfinite(v) and v > 0]
    if not finite or width < 1:
        return ""
    per = max(1, math.ceil(len(values) / width))
    bins = [max((v for v in values[i : i + per] if v > 0), default=0.0) for i in range(0, len(values), per)]
    low, high = math.log(min(finite)), math.log(max(finite))
    span = max(high - low, 0.1)
    drawn = []
    for value in bins:
        if not math.isfinite(value):
            drawn.append("!")
        elif value <= 0:
            drawn.append(" ")
        else:
            drawn.append(BARS[min(7, int(8 * (math.log(value) - low) / span))])
    return "".join(drawn)


def view(tail: Tail, width: int) -> RenderableType:
    """What ``distclip watch`` shows."""
    title = Text(f" {tail.path.name} ", style="bold")
    if not tail.steps:
        return Panel(Text("waiting for the first step …", style="dim"), title=title, title_align="left")
    last = tail.steps[-1]
    recent = list(tail.steps)[-RECENT:]
    clipped = sum(s.clipped for s in recent) / len(recent)
    ordered = sorted(s.norm for s in recent if math.isfinite(s.norm))
    median = ordered[len(ordered) // 2] if ordered else math.nan
    pace = tail.pace()

    grid = Table.grid(padding=(0, 3))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    threshold = f"{last.threshold:.4g}" if not math.isnan(last.threshold) else "–"
    spikes = sum(1 for s in recent if math.isfinite(s.norm) and s.norm > 2 * median)
    bad = sum(s.nonfinite for s in recent)
    grid.add_row(
        _pair("step", f"{last.step:,}", "bold"),
        _pair("norm", f"{last.norm:.4g}", "bold cyan"),
        _pair("threshold", threshold, "yellow"),
        _pair("coefficient", f"{last.coefficient:.3g}", ""),
    )
    grid.add_row(
        _pair("steps/s", "–" if pace is None else f"{pace:.3g}", ""),
        _pair("median", f"{median:.4g}", "cyan"),
        _pair("clipped", f"{clipped:.0%}", "bold red" if clipped > 0.95 else "green"),
        _pair("loss", "–" if last.loss is None else f"{last.loss:.4g}", ""),
    )
    grid.add_row(
        _pair("skipped", str(sum(s.skipped for s in recent)), ""),
        _pair("spikes", str(spikes), "red" if spikes else ""),
        _pair("non-finite", str(bad), "bold red" if bad else ""),
        Text(f"(of the last {len(recent)} steps)", style="dim"),
    )
    lines: list[RenderableType] = [grid, Text()]
    lines.append(Text(sparkline([s.norm for s in tail.steps], width - 6), style="cyan", no_wrap=True))
    lines.append(Text(f"norm of the last {len(tail.steps):,} steps, log scale", style="dim"))
    subtitle = Text(f" {tail.strategy} " if tail.strategy else "", style="dim")
    return Panel(Group(*lines), title=title, title_align="left", subtitle=subtitle, subtitle_align="right")


def watch(tail: Tail, show: Callable[[RenderableType], object], width: int, interval: float) -> None:
    """Look and show, for ever."""
    while True:
        tail.look()
        show(view(tail, width))
        time.sleep(interval)


def _pair(name: str, value: str, style: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))
