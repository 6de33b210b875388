"""``python -m distclip.bench``, alone or under torchrun."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from distclip.bench.cases import Row, Setting, measure
from distclip.bench.contenders import CONTENDERS
from distclip.bench.models import PLACEMENTS, placements_of
from distclip.bench.scaling import study
from distclip.bench.shapes import SHAPES
from distclip.bench.table import as_json, machine, text
from distclip.decide.terminal import never_raise

_CASES = ("first", "unclipped", "clipped", "changing", "step", "exposed")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; its exit code."""
    never_raise()
    asked = _parser().parse_args(arguments)
    if asked.scaling:
        print(study(lambda said: print(said, file=sys.stderr, flush=True)))
        return 0
    if asked.ranks > 1 and "RANK" not in os.environ:
        return _start_ranks(asked.ranks, sys.argv[1:] if arguments is None else arguments)
    device = _device(asked.device)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _init_process_group(device, asked.placements)
    try:
        return _run(asked, device)
    finally:
        if dist.is_initialized():
            dist.barrier()
            gc.collect()  # a model that outlives its process group may abort the process
            dist.destroy_process_group()


def _run(asked: argparse.Namespace, device: torch.device) -> int:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    first = not dist.is_initialized() or dist.get_rank() == 0
    possible = placements_of(world_size)
    placements = asked.placements or possible
    for placement in placements:
        if placement not in possible:
            said = f"{placement} needs another number of ranks than {world_size}"
            print(f"distclip bench: {said}", file=sys.stderr)
            return 2
    setting = Setting(
        device,
        _DTYPES[asked.dtype],
        asked.rounds,
        asked.scale,
        ["distclip", "torch", *(p for p in asked.peers if p not in ("distclip", "torch"))],
        asked.cases,
    )
    rows: list[Row] = []
    todo = [(shapes, placement) for shapes in asked.shapes for placement in placements]
    for i, (shapes, placement) in enumerate(todo):
        if first:
            print(f"[{i + 1}/{len(todo)}] {shapes}, {placement}", file=sys.stderr, flush=True)
        rows += measure(shapes, placement, setting)
    if first:
        about = machine(device, world_size)
        print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items()), end="\n\n")
        print(text(rows))
        if asked.json:
            asked.json.write_text(as_json(rows, device, world_size) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distclip bench",
        description="Time gradient clipping by distclip, torch and the peers that are installed, in turn, on "
        "gradients of real shapes. Ratios are what counts: absolute times are the machine's.",
        epilog="Under torchrun: torchrun --nproc-per-node 8 -m distclip.bench --shapes llama --scale 1",
    )
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="start so many ranks on this machine (1)")
    _several(add, "--shapes", SHAPES, ["small", "medium"], "models: small medium")
    _several(add, "--placements", PLACEMENTS, None, "all that the world allows")
    _several(add, "--cases", _CASES, list(_CASES[:4]), "the first four")
    _several(add, "--peers", CONTENDERS, list(CONTENDERS), "distclip, torch and those that are installed")
    add("--scale", type=float, help="multiplies the widths (1; llama 1/11)")
    add("--dtype", choices=_DTYPES, default="float32")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--rounds", type=int, default=15, help="calls of each; their median counts (15)")
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    add("--scaling", action="store_true", help="instead: plan for 8 to 16,384 ranks, on a fake process group")
    return parser


def _several(
    add: Callable[..., object], flag: str, choices: Iterable[str], default: list[str] | None, said: str
) -> None:
    choices = list(choices)
    help_ = f"{', '.join(choices)} ({said})"
    add(flag, nargs="+", choices=choices, default=default, metavar="NAME", help=help_)


def _device(asked: str | None) -> torch.device:
    if (asked or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def _init_process_group(device: torch.device, placements: Sequence[str] | None) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif not placements or set(placements) - {"plain"}:  # one rank, for DDP
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _start_ranks(ranks: int, arguments: Sequence[str]) -> int:
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torchrun(["--standalone", f"--nproc-per-node={ranks}", "-m", "distclip.bench", *arguments])
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
