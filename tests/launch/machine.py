"""What the tests of the launch starters need of the machine, and how they run things on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
EXAMPLE = ROOT / "examples" / "char_lm.py"
# What a launcher around the tests, or the rank pool, may have set.
_FOREIGN = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC",
    "NNODES",
    "NPROC_",
    "RDZV_",
    "IFACE",
    "SLURM_",
)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what some launcher has set, on the CPU, one thread a rank."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=environment() if env is None else env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


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
