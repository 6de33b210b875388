"""The results as text and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import torch

from distclip.bench.cases import Row

_HEAD = ("model", "placement", "dtype", "case", "who", "ms", "× torch", "× floor", "passes", "coll.", "syncs")


def text(rows: Sequence[Row]) -> str:
    """A Markdown table that lines up in a terminal too. ``× torch``: how many times as fast as torch;
    ``× floor``: time over that of a plain read; ``passes``: bytes moved over those of the gradients."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    numbers_from = 5

    def written(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i >= numbers_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 1) + (":" if i >= numbers_from else "-") for i, w in enumerate(widths))
    notes = sorted({f"{r.contender} on {r.placement}: {r.note}" for r in rows if r.note})
    body = [written(_cells(row)) for row in rows if not row.note]
    return "\n".join([written(_HEAD), f"|{rule}|", *body, *(f"\n{note}" for note in notes)])


def as_json(rows: Sequence[Row], device: torch.device, world_size: int) -> str:
    return json.dumps(
        {"date": date.today().isoformat(), **machine(device, world_size), "rows": [_plain(r) for r in rows]},
        indent=1,
    )


def machine(device: torch.device, world_size: int) -> dict[str, Any]:
    """In kind: what a reader has to know to compare."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return {
        "device": kind,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _plain(row: Row) -> dict[str, Any]:
    finite = {k: v for k, v in asdict(row).items() if not (isinstance(v, float) and math.isnan(v))}
    return {k: v for k, v in finite.items() if v not in (None, "")}


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.shapes,
        row.placement,
        row.dtype,
        row.case,
        row.contender,
        _number(row.seconds * 1e3),
        _number(row.ratio),
        _number(row.of_floor),
        _number(row.passes),
        "" if row.collectives is None else str(row.collectives),
        "" if row.host_syncs is None else str(row.host_syncs),
    )


def _number(x: float) -> str:
    if math.isnan(x):
        return ""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"
