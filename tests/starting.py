"""Start programs as their users do: in processes of their own, on the CPU, one thread a rank."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
LAUNCH, EXAMPLES = ROOT / "launch", ROOT / "examples"
EXAMPLE = EXAMPLES / "char_lm.py"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""For tests that assert a fault of torch: in which releases it has it."""
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
    ranks: int = 0,
    launcher: tuple[str, ...] = (),
    trouble: tuple[str, ...] = ("terminate called", "Traceback", "Warning"),
    **more: str,
) -> tuple[str, str]:
    """What an example says on stdout and on stderr: cleanly, and without any word of ``trouble``.

    ``ranks``: so many processes with what torchrun sets, and a store outside of them as its agent has; for 0
    one, and none of that. They are forked from one that has imported torch, which takes most of the time of a
    short program. ``launcher``: a real one in place of that.
    """
    if launcher:
        done = python(*launcher, EXAMPLES / example, *options, **more)
        out, err = done.stdout, done.stderr
    else:
        ended = forked(ranks, EXAMPLES / example, *options, **more)
        out, err = "".join(ended.out), "".join(ended.err)
        assert not any(ended.codes), f"{ended.codes}\n{out}{err}"
    for word in trouble:
        assert word not in err, err
    return out, err


@dataclass
class Ended:
    """By rank: exit codes, and what was written."""

    codes: list[int]
    out: list[str]
    err: list[str]


def forked(ranks: int, script: Path, *arguments: str | Path, **more: str) -> Ended:
    """The script, started so many times. ``more``: of the environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    job |= {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
    }
    job |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(max(ranks, 1)):
            own = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
            given = (environment(**own, **more), [str(script), *map(str, arguments)], f"{folder}/{rank}")
            processes.append(context.Process(target=_program, args=given))
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        while any(p.is_alive() for p in processes) and time.monotonic() < end:
            wait([p.sentinel for p in processes if p.is_alive()], timeout=1.0)
            if any(p.exitcode for p in processes):  # the others may wait for it: torchrun ends them too
                end = min(end, time.monotonic() + 10.0)
        for process in processes:
            process.kill()
            process.join()
        return Ended(
            [int(p.exitcode or 0) for p in processes],
            [Path(f"{folder}/{rank}.out").read_text() for rank in range(len(processes))],
            [Path(f"{folder}/{rank}.err").read_text() for rank in range(len(processes))],
        )


def _program(variables: dict[str, str], arguments: list[str], output: str) -> None:
    """In a process of its own: the script as Python runs it."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    code: object = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # a forked process has none of its own
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
