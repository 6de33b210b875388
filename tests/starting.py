"""Start programs as their users do: in processes of their own, on the CPU, one thread a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH, EXAMPLES = ROOT / "launch", ROOT / "examples"
EXAMPLE = EXAMPLES / "char_lm.py"
LIMIT = 600.0
"""Seconds, against hangs alone: many times what anything here takes."""

# What a launcher around the tests, or the rank pool, may have set.
_FOREIGN = (
    "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "NNODES", "NPROC_", "RDZV_", "IFACE", "SLURM_"
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """This process's, without what some launcher has set."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=environment() if env is None else env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def python(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """This interpreter, which has to end cleanly. ``more``: of the environment."""
    done = run(sys.executable, *arguments, env=environment(**more))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(ranks: int) -> tuple[str, ...]:
    """The launcher for so many ranks; for 0, none."""
    if ranks == 0:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def start(
    example: str,
    *options: str,
    launcher: tuple[str, ...] = (),
    trouble: tuple[str, ...] = ("terminate called", "Traceback", "Warning"),
    **more: str,
) -> tuple[str, str]:
    """What an example says on stdout and on stderr: cleanly, and without any word of ``trouble``."""
    done = python(*launcher, EXAMPLES / example, *options, **more)
    for word in trouble:
        assert word not in done.stderr, done.stderr
    return done.stdout, done.stderr
