"""Ranks that run a command of ``distclip`` as a launcher would start them, each a process of its own, forked
from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.starting import LIMIT

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass
class Ended:
    """By rank: exit codes, and what was written."""

    codes: list[int]
    out: list[str]
    err: list[str]


def launch(ranks: int, folder: Path, *arguments: str | Path) -> Ended:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp"])
    meeting = folder / f"meeting{len(list(folder.iterdir()))}"
    started = [
        context.Process(
            target=_rank, args=(rank, ranks, str(meeting), str(folder), list(map(str, arguments)))
        )
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT)
        assert process.exitcode is not None, "a hang"
    return Ended(
        [process.exitcode for process in started if process.exitcode is not None],
        [(folder / f"out.{rank}").read_text() for rank in range(ranks)],
        [(folder / f"err.{rank}").read_text() for rank in range(ranks)],
    )


def _rank(rank: int, ranks: int, meeting: str, folder: str, arguments: list[str]) -> None:
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ["INIT_METHOD"] = f"file://{meeting}"
    code = 1
    try:
        import torch

        from distclip.cli import main

        torch.set_num_threads(1)
        if arguments[0] == "alone":  # as Python runs it
            sys.argv = arguments[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        else:
            code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
