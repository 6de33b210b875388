"""What a strategy must not look at: values on the device, random state, which rank it is on."""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from distclip.torch_private.operators import TorchDispatchMode

_INDEX = torch.ops.aten.index.Tensor
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_WAITING_METHODS = {"__array__", "cpu", "numpy", "tolist"}  # where dispatch sees nothing for a CPU tensor
_NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


class HostReads:
    """``with reads.watched():`` notices where the host waits for a value, or for a shape that depends on one.

    Attributes:
        first: the operator and the line of the first such place; "" if there was none.
    """

    def __init__(self) -> None:
        self.first = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_Operators(self))
            stack.enter_context(_Methods(self))
            yield

    def note(self, operator: str) -> None:
        if not self.first:
            stack = reversed(traceback.extract_stack())
            line = next(frame for frame in stack if not frame.filename.startswith(_NOT_THE_USERS))
            self.first = f"{operator} in {Path(line.filename).name}:{line.lineno}: {line.line or ''}"


def waits(func: Any, args: Any) -> bool:
    """Whether the operator makes the host wait for a value, or for a shape that depends on one."""
    if func is _INDEX:  # waits to count the elements of a mask
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return not _WAITS.isdisjoint(func.tags)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is not annotated
    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            self._reads.note(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _WAITING_METHODS:
            self._reads.note(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Global random state that depends on ``seed``; afterwards it is what it was."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    before = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(before)


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """The environment that a launcher gives to a rank."""
    theirs = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(rank + 1)}
    before = {name: os.environ.get(name) for name in theirs}
    os.environ.update(theirs)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
