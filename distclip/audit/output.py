"""A judgement, to be read: in a terminal, in a browser, by programs as JSON, and by ``distclip report``."""

from __future__ import annotations

import html
import json
import math
import shutil
import string
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from distclip._version import __version__
from distclip.audit.finding import Finding
from distclip.audit.judgement import Judged, Judgement

_MARKS = {"wrong": "✗", "cost": "•", "note": "•"}


def as_text(judgement: Judgement, width: int | None = None) -> str:
    """A table of the calls, and the findings below it."""
    width = width or min(shutil.get_terminal_size((110, 24)).columns, 120)
    ranks = f"{judgement.world_size} rank{'s' * (judgement.world_size > 1)}"
    lines = [f"distclip audit: {judgement.verdict} ({ranks}, torch {torch.__version__})", ""]
    columns = "where", "function", "calls", "norm", "true norm", "max_norm", "ms", "distclip's"
    rows = [(*columns, "collectives", "syncs")]
    for call in judgement.calls:
        rows.append(
            (
                call.where,
                call.function.split(".")[-1],
                str(call.calls),
                _number(call.norm),
                _number(call.true_norm),
                _number(call.max_norm),
                f"{call.seconds * 1e3:.2f}",
                _milliseconds(call.ours),
                str(call.collectives),
                str(call.syncs),
            )
        )
    if judgement.calls:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            padded = zip(row, widths, (str.ljust, str.ljust, *[str.rjust] * 8), strict=True)
            cells = [pad(cell, size) for cell, size, pad in padded]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    order = {"wrong": 0, "cost": 1, "note": 2}
    for finding in sorted(judgement.findings, key=lambda f: order[f.severity]):
        place = f"{finding.where}: " if finding.where else ""
        lines += _wrapped(f"{_MARKS[finding.severity]} {finding.kind}  {place}{finding.message}", width)
        lines += _wrapped(f"  → {finding.remedy}", width)
    if not judgement.findings:
        lines.append("✓ nothing to object to")
    lines += _wrapped(f"  the audit itself: {judgement.overhead * 1e3:.2f} ms a call", width)
    for trouble in judgement.troubles:
        lines += _wrapped(f"  could not look into something: {trouble}", width)
    return "\n".join(lines)


def as_dict(judgement: Judgement) -> dict[str, Any]:
    """``verdict``, ``calls`` with their ``findings``, ``findings`` of no call, ``world_size``, ``torch``,
    ``distclip``. Numbers that are not finite are strings."""
    return {
        "verdict": judgement.verdict,
        "calls": [
            {
                "function": call.function,
                "where": call.where,
                "calls": call.calls,
                "ranks": list(call.ranks),
                "norm": _plain(call.norm),
                "true_norm": _plain(call.true_norm),
                "max_norm": _plain(call.max_norm),
                "seconds": call.seconds,
                "distclip_seconds": call.ours,
                "share": call.share,
                "collectives": call.collectives,
                "syncs": call.syncs,
                "findings": [finding.to_dict() for finding in call.findings],
            }
            for call in judgement.calls
        ],
        "findings": [finding.to_dict() for finding in judgement.general],
        "overhead_seconds": judgement.overhead,
        "troubles": judgement.troubles,
        "world_size": judgement.world_size,
        "torch": torch.__version__,
        "distclip": __version__,
    }


def write_json(path: Path, judgement: Judgement) -> None:
    path.write_text(json.dumps(as_dict(judgement), indent=1) + "\n", encoding="utf-8")


def write_history(path: Path, judgement: Judgement) -> None:
    """One line of JSON for each call that was looked into, of the place that was called most."""
    place = max(judgement.calls, key=lambda call: len(call.norms), default=None)
    lines = []
    for number, norm, true in place.norms if place is not None else ():
        record: dict[str, Any] = {"step": number, "total_norm": norm if true is None else true}
        if place is not None and place.max_norm is not None and math.isfinite(place.max_norm):
            record["threshold"] = place.max_norm
        lines.append(json.dumps(record))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_page(path: Path, judgement: Judgement, *, program: str) -> None:
    """One page that needs nothing but a browser."""
    calls = "".join(map(_row, judgement.calls))
    findings = "".join(map(_item, judgement.findings)) or "<p>Nothing to object to.</p>"
    pictures = "".join(_picture(call) for call in judgement.calls if len(call.norms) > 1)
    template = string.Template((resources.files("distclip.audit") / "page.html").read_text("utf-8"))
    page = template.substitute(
        program=html.escape(program),
        verdict=judgement.verdict,
        world=judgement.world_size,
        torch=html.escape(torch.__version__),
        distclip=__version__,
        calls=calls,
        findings=findings,
        pictures=pictures,
        overhead=f"{judgement.overhead * 1e3:.2f}",
    )
    path.write_text(page, encoding="utf-8")


def _row(call: Judged) -> str:
    cells = [
        f"<code>{html.escape(call.where)}</code>",
        f"<code>{html.escape(call.function)}</code>",
        str(call.calls),
        _number(call.norm),
        _number(call.true_norm),
        _number(call.max_norm),
        f"{call.seconds * 1e3:.2f}",
        _milliseconds(call.ours),
        f"{call.share:.1%}",
        str(call.collectives),
        str(call.syncs),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _item(finding: Finding) -> str:
    place = f"<code>{html.escape(finding.where)}</code> " if finding.where else ""
    return (
        f'<div class="card {finding.severity}"><b>{finding.kind}</b> {place}'
        f"<p>{html.escape(finding.message)}</p><p>→ {html.escape(finding.remedy)}</p></div>"
    )


def _picture(call: Judged) -> str:
    """The norms, as returned and as they are, by call; an inline SVG."""
    width, height = 760, 200
    found = [(k, n) for k, n, _ in call.norms if math.isfinite(n)]
    true = [(k, t) for k, _, t in call.norms if t is not None and math.isfinite(t)]
    if not found:
        return ""
    top = max(n for _, n in found + true) or 1.0
    last = max(k for k, _ in found) or 1

    def points(series: list[tuple[int, float]]) -> str:
        return " ".join(
            f"{10 + k / last * (width - 20):.1f},{height - 10 - n / top * (height - 30):.1f}"
            for k, n in series
        )

    return (
        f'<figure class="card"><figcaption><code>{html.escape(call.where)}</code>: the norm by call, '
        f"up to {top:.4g}; returned (line) and true (dots)</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img"><polyline class="norm" points="{points(found)}"/>'
        + "".join(
            f'<circle class="true" r="2.5" cx="{x}" cy="{y}"/>'
            for x, y in (p.split(",") for p in points(true).split())
        )
        + "</svg></figure>"
    )


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False) or [text]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
