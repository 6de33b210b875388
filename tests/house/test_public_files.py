"""What a repository shows beside its code: workflows, issue forms, the citation, the table of releases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import compatibility

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_a_file_is_what_it_is_read_as(schema: str, paths: list[Path]) -> None:
    assert paths
    result = run("check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths))
    assert result.returncode == 0, result.stdout + result.stderr


def test_workflows_are_safe(tmp_path: Path) -> None:
    """Actions pinned by hash, no credentials left, no more permissions than needed."""
    zizmor = str(Path(sys.executable).parent / "zizmor")
    result = subprocess.run([zizmor, "--offline", *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_workflows_run_what_is_here() -> None:
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    scripts = set(re.findall(r"(?:bash|python) (\S*\w\S*)", text))
    assert {".ci/run", "launch/matrix.sh"} <= scripts
    assert all((ROOT / script).is_file() for script in scripts)
    named = set(re.findall(r"(?:row: |matrix.sh )((?:torch|frameworks)-[\w.]+)", text))
    assert named <= set(compatibility.order()), "a row that launch/matrix.sh does not have"


def test_forms_ask_for_the_doctor() -> None:
    assert all("distclip doctor" in path.read_text() for path in FORMS)


def test_the_page_of_releases_is_made_from_the_data() -> None:
    rows = json.loads(compatibility.DATA.read_text())
    assert compatibility.PAGE.read_text() == compatibility.page_of(rows)
    assert list(rows) == [name for name in compatibility.order() if name in rows]


@pytest.mark.parametrize(
    ("release", "words"),
    [("2.5.1", "older than"), ("99.0", "newer than"), ("2.13.0+cpu", "tested")],
)
def test_where_a_release_stands(release: str, words: str) -> None:
    from distclip.inspection.compatibility import among

    assert among(release, ["2.6.0", "2.13.0", "2.15.0"]).startswith(words)
