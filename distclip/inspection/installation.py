"""What is installed here, and whether it fits: torch, devices, backends, the launcher's variables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
import torch.distributed as dist

from distclip._version import __version__
from distclip.inspection.compatibility import release_numbers, standing
from distclip.launching import VARIABLES, launch_problems

LIBRARIES = (
    "numpy",
    "orjson",
    "rich",
    "typer",
    "plotly",
    "matplotlib",
    "tensorboard",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note" to know; "problem" to look into.
        topic: what was looked at.
        text: what was found, and what to do about it.
    """

    level: Literal["ok", "note", "problem"]
    topic: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine_installation(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """torch, devices, backends, launch variables, optional libraries."""
    found = [
        Finding("ok", "distclip", f"{__version__} on {platform.system()} {platform.machine()}"),
        *_compatibility(),
    ]
    found.append(_devices())
    if not dist.is_available():
        found.append(Finding("problem", "backends", "this torch is built without torch.distributed"))
    else:
        names = (
            ("gloo", dist.is_gloo_available),
            ("nccl", dist.is_nccl_available),
            ("mpi", dist.is_mpi_available),
        )
        there = [name for name, available in names if available()]
        lacks = torch.cuda.is_available() and "nccl" not in there
        level: Literal["ok", "problem"] = "problem" if lacks or not there else "ok"
        found.append(
            Finding(level, "backends", ", ".join(there) + (" (no nccl for these GPUs)" if lacks else ""))
        )
    found += _launch(environment)
    have = {name: _version(name) for name in LIBRARIES}
    listed = ", ".join(f"{name} {found_version}" for name, found_version in have.items() if found_version)
    found.append(Finding("ok", "libraries", listed))
    return found


def _compatibility() -> list[Finding]:
    """Whether distclip was run with what is installed."""
    found = []
    for name, (release, where) in standing().items():
        if name == "torch" and release_numbers(release) < (2, 6):
            found.append(Finding("problem", name, f"{release}: distclip needs 2.6 or newer"))
        else:
            level: Literal["ok", "note"] = "ok" if where == "tested" else "note"
            found.append(Finding(level, name, f"{release}, {where}"))
    return found


def _devices() -> Finding:
    if not torch.cuda.is_available():
        return Finding("note", "GPUs", f"none; {torch.get_num_threads()} threads on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))} (CUDA {torch.version.cuda})")


def _launch(environment: Mapping[str, str]) -> list[Finding]:
    given = {name: environment[name] for name in VARIABLES if name in environment}
    found = [Finding("problem", "launch", text) for text in launch_problems(environment)]
    if not given:
        text = "not under a launcher (torchrun sets RANK, WORLD_SIZE, MASTER_ADDR, …): one process"
        return found or [Finding("note", "launch", text)]
    local = given.get("LOCAL_WORLD_SIZE", "1")
    crowded = local.isdigit() and int(local) > 1 and not torch.cuda.device_count()
    if crowded and "OMP_NUM_THREADS" not in environment:
        text = f"OMP_NUM_THREADS is not set: {local} ranks compete for the cores; try 1"
        found.append(Finding("note", "launch", text))
    return found or [Finding("ok", "launch", ", ".join(f"{k}={v}" for k, v in given.items()))]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
