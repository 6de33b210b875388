"""What the tests of the launch starters need of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def require_programs(*programs: str, packages: tuple[str, ...], unless: str) -> None:
    """Fail where they are missing and cannot be installed. Skips only where the variable ``unless`` says so:
    a test that silently does not run is worth nothing."""
    if os.environ.get(unless):
        pytest.skip(f"{unless} is set")
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

    def missing() -> list[str]:
        return [program for program in programs if shutil.which(program, path=path) is None]

    if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ("apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=120")
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*apt, "update"], env=env, capture_output=True, check=False)
        subprocess.run(
            [*apt, "install", "--no-install-recommends", *packages], env=env, capture_output=True, check=False
        )
    if missing() or os.geteuid() != 0:
        pytest.fail(
            f"needs root and {', '.join(programs)} ({', '.join(packages)} of Debian): "
            f"install them, or set {unless}=1 to do without this test"
        )
