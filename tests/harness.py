"""A persistent pool of real gloo ranks, so that a distributed test costs milliseconds, not seconds.

    @on_ranks(4)
    def test_something(rank: int) -> None:
        ...                                   # runs in 4 processes that share a gloo process group

The processes are started once per world size and pytest worker, from a fork server that has torch
imported already, and meet through a FileStore. After any failure or timeout the whole pool is killed: a
rank that skipped a collective would break the next, innocent test. Every rank's traceback is shown.

A rank that is killed by a signal gives no verdict: the test is run again on new ranks, once, and a warning
says so and where the rank was. (Seen twice in some thirty thousand tests, as "free(): invalid pointer" inside
native code; with AddressSanitizer and valgrind underneath the same tests ran clean.)
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import inspect
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import Layout
from tests.starting import TORCH

_TIMEOUT = 240.0  # seconds for one test, after the pool is up: against hangs, on a slow machine too
_START_TIMEOUT = 240.0


class RankFailure(AssertionError):
    """What went wrong, by rank."""


class RankKilled(RankFailure):
    """A rank was ended by a signal, in native code."""


@dataclass(frozen=True)
class Job:
    """A test body to be found by name, and what to call it with."""

    module: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    with_rank: bool


class RankPool:
    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp"])
        self.world_size = world_size
        self._directory = tempfile.TemporaryDirectory(prefix="distclip-ranks-")
        store = os.path.join(self._directory.name, "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._gather(_START_TIMEOUT)

    def run(self, job: Job, timeout: float) -> list[Any]:
        """Run the job on every rank; the results in order of rank."""
        for pipe in self._pipes:
            pipe.send(job)
        return self._gather(timeout)

    def _gather(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        killed = False
        deadline = time.monotonic() + timeout
        waiting = dict(enumerate(self._pipes))
        while waiting:
            left = deadline - time.monotonic()
            ready = wait(list(waiting.values()), timeout=max(0.0, left))
            if not ready:
                break
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    del waiting[rank]
                    try:
                        ok, value = pipe.recv()
                    except EOFError:
                        self._processes[rank].join(5)
                        code = self._processes[rank].exitcode
                        killed = killed or (code is not None and code < 0)
                        ok, value = (
                            False,
                            f"the process died, exit code {code}\n{self._last_words(rank)}",
                        )
                    (results if ok else errors)[rank] = value
            if errors:  # the others may be waiting for this one: give them a moment to say so
                deadline = min(deadline, time.monotonic() + 3.0)
        if waiting or errors:
            self.kill()
            failure = RankKilled if killed else RankFailure
            said = [f"--- rank {rank} ---\n{error}" for rank, error in sorted(errors.items())]
            said += [
                f"--- rank {rank} --- did not finish (a hang, or another rank failed)" for rank in waiting
            ]
            raise failure(f"on {self.world_size} ranks:\n" + "\n".join(said))
        return [results[rank] for rank in range(self.world_size)]

    def _last_words(self, rank: int) -> str:
        """The stacks that faulthandler has left."""
        path = Path(self._directory.name, f"stacks.{rank}")
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._directory.cleanup()
        _pools.pop(self.world_size, None)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
        self.kill()


_pools: dict[int, RankPool] = {}


def pool(world_size: int) -> RankPool:
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size]


@atexit.register
def _close_pools() -> None:
    for p in list(_pools.values()):
        p.kill()


def on_ranks(
    world_size: int, timeout: float = _TIMEOUT
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a test on that many gloo ranks. Its first argument is the rank; the others come from pytest
    (parameters that can be pickled). What the ranks return must be equal on all of them, if anything."""

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        def test(*args: Any, **kwargs: Any) -> None:
            _run_on_pool(world_size, body, args, kwargs, timeout)

        parameters = list(inspect.signature(body).parameters.values())
        return pytest.mark.distributed(_named_like(body, test, parameters[1:]))

    return decorate


def on_row(
    rows: Mapping[str, Layout], timeout: float = _TIMEOUT
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a test for each row of the placement table, on as many ranks as the row says (1: right here,
    without a process group). Its first argument is the row's name."""

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        def test(*args: Any, row: str, **kwargs: Any) -> None:
            if rows[row].world == 1:
                body(row, *args, **kwargs)
            else:
                _run_on_pool(rows[row].world, body, (row, *args), kwargs, timeout, with_rank=False)

        parameters = list(inspect.signature(body).parameters.values())
        return pytest.mark.parametrize("row", list(rows))(
            pytest.mark.distributed(_named_like(body, test, parameters))
        )

    return decorate


def _run_on_pool(
    world_size: int,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float,
    with_rank: bool = True,
) -> None:
    job = Job(body.__module__, body.__qualname__, args, kwargs, with_rank)
    try:
        results = pool(world_size).run(job, timeout)
    except RankKilled as killed:
        warnings.warn(f"a rank was killed by a signal, the test is run again: {killed}", stacklevel=1)
        results = pool(world_size).run(job, timeout)
    assert all(r == results[0] for r in results), f"ranks disagree: {results}"


def _named_like(
    body: Callable[..., Any], test: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(test, attribute, getattr(body, attribute))
    # pytest asks the signature for its fixtures: the rank is none.
    test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    test.__body__ = body  # type: ignore[attr-defined]
    return test


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.enable(open(os.path.join(os.path.dirname(store), f"stacks.{rank}"), "w"))  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    warnings.simplefilter("error")
    quiet_known_warnings()
    mend_torch()
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    modules = 0
    while (job := pipe.recv()) is not None:
        try:
            importlib.import_module(job.module)
            if len(sys.modules) > modules:  # by now, and in the test before
                gc.freeze()  # what is imported lives on: it need not be looked through after every test
                modules = len(sys.modules)
            test = getattr(sys.modules[job.module], job.name)
            torch.manual_seed(0)
            args = (rank, *job.args) if job.with_rank else job.args
            result = test.__body__(*args, **job.kwargs)
            gc.collect()  # FSDP models die here, with the process group still alive
            _drop_groups()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _drop_groups() -> None:
    """Destroy the process groups that a test has made: each has threads and sockets of its own.

    Those of the meshes that ``tests.layouts`` shares between tests stay.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world
    from torch.distributed.tensor import DTensor, debug

    from tests import layouts

    keep = {group.group_name for mesh in layouts.MESHES.values() for group in mesh.get_all_groups()}
    keep.add(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    dist.barrier()  # no rank is still in a collective of theirs
    dropped = [group for group in _world.pg_map if group.group_name not in keep]
    for group in dropped:
        dist.destroy_process_group(group)
    if not dropped:
        return
    # DTensor remembers results by equal meshes, and would return one whose groups are gone.
    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:  # 2.6
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()


def let_go(*references: weakref.ref[Any]) -> bool:
    """Whether what they refer to is gone, or goes as soon as torch's threads have had the interpreter.

    The thread that ran DDP's hook wakes the backward pass first and drops the bucket, and with it the
    parameters, after that.
    """
    deadline = time.monotonic() + 5.0
    gc.collect()
    while alive := any(reference() is not None for reference in references):
        if time.monotonic() > deadline:
            break
        time.sleep(0.001)
    return not alive


def mend_torch() -> None:
    """What torch 2.8 gets wrong on the CPU, and a GPU does not see: FSDP2 asks gloo for the mean over ranks,
    which gives the sum. (So would ``set_force_sum_reduction_for_comms(True)``, of each module.)"""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    if TORCH == (2, 8):
        factors = _fsdp_collectives._get_gradient_divide_factors

        def divided(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(factors).bind(*args, **kwargs).arguments
            return factors(**{**given, "force_sum_reduction_for_comms": True})

        _fsdp_collectives._get_gradient_divide_factors = divided


def quiet_known_warnings() -> None:
    """Warnings of torch's own making that say nothing about distclip, each with its reason."""
    for message in (
        # torch internals that call torch's own deprecated functions
        ".*is deprecated.*",
        ".*will be deprecated.*",
        ".*deprecated and will be removed.*",
    ):
        warnings.filterwarnings("ignore", message=message, module="torch")
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # torch 2.11 says so even where the checks are asked for.
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    # Of torch.compile, once a process.
    warnings.filterwarnings("ignore", message="Guards may run slower on Python 3.13.0")
    # Of Accelerate before 1.15 on rank 0 alone, about checkpoints.
    warnings.filterwarnings("ignore", message="FSDP upcast of low precision parameters to fp32")
    # Of torch 2.6, about dropout.
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
