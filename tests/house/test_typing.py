"""User code type-checks, and wrong user code does not (its ignores would be reported as unused)."""

from __future__ import annotations

from pathlib import Path

from tests.starting import python

ROOT = Path(__file__).parents[2]


def test_user_code_type_checks() -> None:
    python("-m", "mypy", "--strict", "tests/typing/user_code.py")
