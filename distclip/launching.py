"""Do the launcher's variables, the devices of this machine and the backend fit together?"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_launch(
    environment: Mapping[str, str] = os.environ,
    *,
    backend: str | None = None,
    world_size: int | None = None,
    gpus: int | None = None,
) -> None:
    """Check what the launcher has set before ranks begin to wait for each other: before
    ``init_process_group``, on every rank. Talks to nobody. One process without a launcher is fine.

    Args:
        environment: where the launcher's variables are.
        backend: the one for ``init_process_group``, ``"nccl"`` say, or ``"cpu:gloo,cuda:nccl"``.
        world_size: how many ranks the program is made for (the product of its mesh), if not any number.
        gpus: those that this process sees; by default it is asked.

    Raises:
        ValueError: what does not fit, each with its remedy.

    Example:
        >>> require_launch(backend="nccl", world_size=8)
        Traceback (most recent call last):
        ValueError: this program needs 8 ranks, and WORLD_SIZE=2: start 8 (nodes × --nproc-per-node)
    """
    found = launch_problems(environment, backend=backend, world_size=world_size, gpus=gpus)
    if found:
        raise ValueError("; ".join(found))


def launch_problems(
    environment: Mapping[str, str] = os.environ,
    *,
    backend: str | None = None,
    world_size: int | None = None,
    gpus: int | None = None,
) -> list[str]:
    """What :func:`require_launch` would raise for, a sentence each."""
    gpus = torch.cuda.device_count() if gpus is None else gpus
    given = {name: environment[name] for name in VARIABLES if name in environment}
    found = []
    missing = [name for name in _NEEDED if name not in given]
    if given and missing:
        found.append(
            f"{', '.join(given)} set, but not {', '.join(missing)}: start with torchrun, which sets them all"
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not given and tasks.isdigit() and int(tasks) > 1:
        found.append(
            f"srun has started {tasks} tasks, and none of them knows of the others (RANK and WORLD_SIZE are "
            "not set): let srun start torchrun, one task on each node, as launch/slurm.sbatch does"
        )
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in given and not (given[name].isascii() and given[name].isdigit()):
            found.append(f"{name}={given[name]!r} is no number")
        elif name in given:
            numbers[name] = int(given[name])
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            found.append(f"{rank}={numbers[rank]} is not below {size}={numbers[size]}")
    world, local = numbers.get("WORLD_SIZE", 1), numbers.get("LOCAL_WORLD_SIZE", 1)
    if "WORLD_SIZE" in numbers and local > world:
        found.append(f"LOCAL_WORLD_SIZE={local} is above WORLD_SIZE={world}: left from another launch?")
    if world_size is not None and world != world_size:
        said = (
            f"WORLD_SIZE={world}" if "WORLD_SIZE" in numbers else "there is one process, without a launcher"
        )
        found.append(
            f"this program needs {world_size} ranks, and {said}: "
            f"start {world_size} (nodes × --nproc-per-node)"
        )
    return found + _devices(backend, gpus, local)


def _devices(backend: str | None, gpus: int, local: int) -> list[str]:
    """What is wrong with ``local`` ranks on a machine of so many GPUs."""
    names = [part.rpartition(":")[2] for part in (backend or "").lower().split(",") if part]
    found = []
    for name in names:
        if not dist.is_available() or not dist.is_backend_available(name):
            found.append(f"{backend=}: this torch {torch.__version__} is built without {name}")
    if "nccl" in names and not gpus:
        found.append(f"{backend=} needs a GPU, and this process sees none: use gloo, or see to the driver")
    elif gpus and local > gpus and (backend is None or "nccl" in names):
        found.append(
            f"{local} ranks on this machine share {gpus} GPUs"
            + (", which nccl refuses" if "nccl" in names else "")
            + f": start at most {gpus} (--nproc-per-node), or keep to the CPU with gloo"
        )
    return found
