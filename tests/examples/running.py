"""Start an example as its users start it, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def torchrun(ranks: int) -> tuple[str, ...]:
    """The launcher for so many ranks; for 0, none."""
    if ranks == 0:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def start(
    example: str,
    *options: str,
    launcher: tuple[str, ...] = (),
    timeout: float = 140,
    trouble: tuple[str, ...] = ("terminate called", "Traceback", "Warning"),
    **environment: str,
) -> tuple[str, str]:
    """What it says on stdout and on stderr. It has to end cleanly, and without any word of ``trouble``."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / example), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in trouble:
        assert word not in done.stderr, done.stderr
    return done.stdout, done.stderr
