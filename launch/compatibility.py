"""Note down one row of launch/matrix.sh: in distclip/inspection/compatibility.json, which ``distclip doctor``
reads, and in docs/compatibility.md, which is made from it. To be run by the Python of that row.

    python launch/compatibility.py NAME TESTS JUNIT_XML SECONDS
    python launch/compatibility.py               # the page alone
    python launch/compatibility.py --check NAME  # exits with 1 where a test of that row has failed
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "distclip" / "inspection" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
FRAMEWORKS = ("accelerate", "transformers", "lightning", "megatron-core")

HEAD = """\
# What distclip was run with

Every row is a run of the tests in an environment of its own, by `launch/matrix.sh`, which also writes this
page. On the CPU, with gloo. `distclip doctor` says whether what you have is in this table.

| torch | Python | frameworks | tests | passed | failed | skipped | minutes | date |
|---|---|---|---|---|---|---|---|---|
"""
TESTS = {
    "all": "all",
    "core": "the core, and the integrations",
    "frameworks": "the integrations",
}


def row_of(tests: str, junit: Path, seconds: float) -> dict[str, Any]:
    """What a run said, with the versions of the Python that runs this."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ET.parse(junit).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '')}::{case.get('name', '')}")
        elif skip is not None:
            skipped[skip.get("message", "")] += 1
        else:
            passed += 1
    return {
        "torch": version("torch").split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "frameworks": {name: _version(name) for name in FRAMEWORKS if _version(name)},
        "tests": tests,
        "passed": passed,
        "failed": failed,
        "skipped": dict(sorted(skipped.items())),
        "minutes": round(seconds / 60, 1),
        "date": datetime.date.today().isoformat(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def page_of(rows: dict[str, dict[str, Any]]) -> str:
    """docs/compatibility.md."""
    lines, reasons = [], {}
    for row in rows.values():
        notes = []
        for reason, count in row["skipped"].items():
            number = reasons.setdefault(reason, len(reasons) + 1)
            notes.append(f"{count} ({number})")
        cells = [
            row["torch"],
            row["python"],
            ", ".join(f"{name} {release}" for name, release in row["frameworks"].items()),
            TESTS[row["tests"]],
            str(row["passed"]),
            str(len(row["failed"])),
            ", ".join(notes) or "0",
            str(row["minutes"]),
            row["date"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = HEAD + "\n".join(lines) + "\n"
    if reasons:
        text += "\nSkipped because:\n\n"
        text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    failed = [f"- torch {row['torch']}: `{name}`\n" for row in rows.values() for name in row["failed"]]
    return text + ("\nFailed:\n\n" + "".join(failed) if failed else "")


def order() -> list[str]:
    """The rows of launch/matrix.sh."""
    script = (ROOT / "launch" / "matrix.sh").read_text()
    return [line.split()[0] for line in script.split('rows="')[1].split('"')[0].splitlines() if line]


def main(arguments: list[str]) -> None:
    rows: dict[str, dict[str, Any]] = json.loads(DATA.read_text()) if DATA.exists() else {}
    if arguments and arguments[0] == "--check":
        failed = rows[arguments[1]]["failed"] if arguments[1] in rows else []
        sys.exit("\n".join(failed) or None)
    if arguments:
        name, tests, junit, seconds = arguments
        rows[name] = row_of(tests, Path(junit), float(seconds))
    rows = {name: rows[name] for name in order() if name in rows}
    DATA.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page_of(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
