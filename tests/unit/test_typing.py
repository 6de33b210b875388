"""User code type-checks, and wrong user code does not (its ignores would be reported as unused)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_user_code_type_checks() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "tests/typing/user_code.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
