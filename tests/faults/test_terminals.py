"""``print(report)`` on a terminal that cannot show an arrow does not end the training."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distclip
from distclip import cli
from distclip.decide.terminal import shown
from tests.starting import python

ENCODINGS = ["ascii", "cp1252", "latin-1", "cp437", "utf-8", "utf-16", "no-such-codec", None]


class Terminal(io.TextIOWrapper):
    """That has ``encoding``, whatever its bytes are."""

    said: str | None = None

    def __init__(self, encoding: str | None) -> None:
        self.said = encoding
        super().__init__(io.BytesIO(), encoding="utf-8" if encoding in (None, "no-such-codec") else encoding)

    @property
    def encoding(self) -> str | None:  # type: ignore[override]
        return self.said


@pytest.fixture
def clipper() -> distclip.Clipper:
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.ones(3, 2)
    return distclip.Clipper([("größe→", p)], distclip.GlobalNorm(1.0, eps=0.0))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_reports_and_tables(
    encoding: str | None, clipper: distclip.Clipper, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, table = clipper.clip(), clipper.describe()
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    print(report)
    print(table)
    print(clipper, repr(report)[:9])
    terminal.flush()
    text = terminal.buffer.getvalue().decode(
        terminal.said if encoding not in (None, "no-such-codec") else "utf-8"
    )  # type: ignore[attr-defined,arg-type]
    unicode = encoding in ("utf-8", "utf-16", None)
    assert text.startswith("norm 2.45 → 1 (×0.408)" if unicode else "norm 2.45 -> 1 (")
    assert ("größe→" in text) == unicode
    assert "3×2" in text or (encoding in ("ascii", "cp437", "no-such-codec") and "3x2" in text)


def test_a_process_of_its_own(tmp_path: Path) -> None:
    program = """
import torch, distclip
from torch import nn
p = nn.Parameter(torch.zeros(3, 2)); p.grad = torch.ones(3, 2)
clipper = distclip.Clipper([("p", p)], distclip.GlobalNorm(1.0))
report = clipper.clip()
print(report); print(f"{report}"); print(clipper.describe()); print(str(report).encode("ascii"))
"""
    done = python("-c", program, PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("norm 2.45 -> 1 (x0.408)")


@pytest.mark.parametrize(
    "arguments", [["recommend"], ["recommend", "--json"], ["replay", "-s", "zclip"], ["doctor"]]
)
def test_the_command_line(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "größe.jsonl"
    lines = [
        {"step": i, "total_norm": 50.0 if i % 40 == 39 else 1 + i % 7 / 10, "clipped_norm": 1.0}
        for i in range(200)
    ]
    lines = [
        line | {"coefficient": 0.9, "threshold": 1.0, "clipped": True, "nonfinite": False, "skipped": False}
        for line in lines
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    terminal = Terminal("ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main([arguments[0], *([] if arguments == ["doctor"] else [str(path)]), *arguments[1:]]) in (
        0,
        1,
    )
    terminal.flush()
    assert terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_what_is_logged_can_be_written_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    clipper = distclip.Clipper(model, distclip.AdaGC())
    for depth in (8, 1):
        del model[depth:]
        model.zero_grad()
        model(torch.ones(2)).sum().backward()
        with caplog.at_level(logging.INFO, logger="distclip"):
            clipper.clip()
    assert "the parameters have changed" in caplog.text
    for record in caplog.records:
        record.getMessage().encode("ascii")


def test_shown() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert shown("a → b × c … ∞ ü", stream) == "a -> b x c ... inf ?"
