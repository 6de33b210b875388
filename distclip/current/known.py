"""What is known of the lists that drop-in functions were called with: one ParameterSet each."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.current.as_called import AsCalled
from distclip.current.parameter_set import ParameterSet
from distclip.layout.life import life_of
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source
from distclip.layout.placement import Axis
from distclip.torch_private.operators import FakeTensor

# What is known of the lists seen last. A list is found again by the identity of every tensor in it, and what
# is known of it ends as soon as one of them dies; its place stays, since garbage collectors do not work in
# step and addresses are used again, and what is evicted next must be the same on every rank. So which list
# is planned anew depends only on which lists are passed: the caller's program, the same on every rank.
_known: dict[tuple[Any, ...], Entry] = {}
_order: OrderedDict[int, Entry] = OrderedDict()  # by number, the latest last
_lock = threading.Lock()  # for these two
_numbers = count()
_MOST_KNOWN = 200_000  # tensors, over all lists


class Entry:
    """What is known of one list.

    Attributes:
        set: what is known.
        parameters: likewise, None once a tensor of it has died, whose address may be another's.
        meshes: over which its tensors lie; None for plain ones.
    """

    def __init__(self, key: tuple[Any, ...], tensors: list[Tensor], norm_type: float, policy: str) -> None:
        self.number, self.key, self.size = next(_numbers), key, len(tensors)
        self._lock = threading.RLock()
        self.strategy = AsCalled(norm_type)
        options = {"norm_type": norm_type, "on_nonfinite": policy}
        self.set = ParameterSet(self.strategy, keep=False, options=options)
        self.parameters: ParameterSet | None = self.set
        self.meshes = _meshes_of(tensors)
        me = weakref.ref(self)

        def end(_: object) -> None:
            if (entry := me()) is not None:
                entry.parameters = None

        self._lives = [weakref.ref(life_of(t), end) for t in tensors if isinstance(t, Tensor)]

    @property
    def living(self) -> list[int]:
        """The ids of its tensors that still live."""
        return [life.owner for reference in self._lives if (life := reference()) is not None]

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """Around a call: another thread may measure the same parameters."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def for_call(self, call: Call) -> tuple[ParameterSet, AsCalled]:
        known = self.parameters
        assert known is not None  # the caller holds its tensors
        known.groups = call.stages, call.process_group
        if not torch.compiler.is_compiling():
            known.asked.of_step = call.words
        return known, self.strategy


class Call(NamedTuple):
    """A call of a drop-in: in words, which are the same on every rank, and what it passes beside the list."""

    words: str
    stages: dist.ProcessGroup | DeviceMesh | None
    process_group: dist.ProcessGroup | DeviceMesh | None


def known_of(
    parameters: Parameters, norm_type: float, policy: str, call: Call
) -> tuple[Parameters, list[Tensor], Entry]:
    may_be_empty = call.stages is not None or call.process_group is not None
    parameters = freeze_source(parameters, may_be_empty=may_be_empty)
    tensors = bare_tensors(parameters)
    asked = (norm_type, _name_of(call.stages, "stages"), _name_of(call.process_group, "process_group"))
    key = (*asked, *map(id, tensors))
    entry, former, otherwise = _known.get(key), None, None
    if entry is None or not torch.compiler.is_compiling():
        with _lock:
            if entry is None or entry.parameters is None:  # its tensors are gone, and these are others
                former, otherwise = _former_list(parameters, asked, tensors), _with_another_p(key)
                entry = Entry(key, tensors, norm_type, policy)
                _known[key] = _order[entry.number] = entry
                while len(_order) > 1 and sum(e.size for e in _order.values()) > _MOST_KNOWN:
                    _, oldest = _order.popitem(last=False)
                    if _known.get(oldest.key) is oldest:
                        del _known[oldest.key]
            if entry.number in _order:
                _order.move_to_end(entry.number)
    if former is not None:
        former.leave(entry.set)
    elif otherwise is not None:
        otherwise.leave(entry.set, call.words)
    if entry.parameters is not None and not torch.compiler.is_compiling():
        _note_source(parameters, asked, entry.parameters)
    return parameters, tensors, entry


def _former_list(
    parameters: Parameters, asked: tuple[Any, ...], tensors: list[Tensor]
) -> ParameterSet | None:
    """What is known of the list that this new one has come from, where the caller makes lists: the latest
    that shares a tensor with it. Its meshes are among these here, and so are its ranks: those for which
    nothing has changed wait in its step, and are told."""
    if not isinstance(parameters, list | tuple) or any(isinstance(p, nn.Module) for p in parameters):
        return None
    if asked[1] is not None:
        return None  # what has become of the lists of other stages is not known
    ids, meshes = set(map(id, tensors)), _meshes_of(tensors)
    for entry in reversed(_order.values()):
        if entry.key[: len(asked)] == asked and not ids.isdisjoint(entry.living):
            return entry.set if entry.meshes <= meshes else None
    return None


def _with_another_p(key: tuple[Any, ...]) -> ParameterSet | None:
    """The latest of these same tensors, in whose step the ranks wait that take the norm as before."""
    return next((e.parameters for e in reversed(_order.values()) if e.key[1:] == key[1:]), None)


def _meshes_of(tensors: Iterable[Any]) -> set[DeviceMesh | None]:
    return {t.device_mesh if isinstance(t, DTensor) else None for t in tensors}


# By the module or optimizer (the first, of several modules) that a list was last read from, and by what was
# asked of it: the other modules, and what is known of the list.
_latest: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[list[Any], ParameterSet]]]
_latest = weakref.WeakKeyDictionary()


def _note_source(parameters: Parameters, asked: tuple[Any, ...], known: ParameterSet) -> None:
    """Where these modules hold another list than in the last call, the ranks that did not see that change,
    and so wait in the step of the former list, are told.

    Raises:
        OwnershipError: on every rank: not all see it.
    """
    source: list[Any] = list(parameters) if isinstance(parameters, list | tuple) else [parameters]
    if not source or not all(isinstance(part, nn.Module | torch.optim.Optimizer) for part in source):
        return
    first, *others = source
    asked = (*asked, len(others))
    try:
        latest = _latest.setdefault(first, {})
    except TypeError:
        return  # of a class whose objects cannot be told apart
    before = latest.get(asked)
    if before is not None and before[1] is known:
        return
    if before is not None and all(ref() is part for ref, part in zip(before[0], others, strict=True)):
        before[1].leave(known)
    latest[asked] = [weakref.ref(part) for part in others], known


class _Alike(threading.local):
    """What this thread knows of gradients, by how they lie, the latest last."""

    def __init__(self) -> None:
        self.sets: OrderedDict[tuple[Any, ...], ParameterSet] = OrderedDict()


_alike = _Alike()
_MOST_ALIKE = 64


def set_like(
    gradients: list[Tensor], norm_type: float, process_group: dist.ProcessGroup | DeviceMesh | None
) -> ParameterSet:
    """What is known of gradients that lie like these: they are other tensors in every step."""
    lies = (
        (
            t.shape,
            t.dtype,
            t.device.type,
            (t.device_mesh, t.placements) if isinstance(t, DTensor) else None,
        )
        for t in gradients
    )
    key = (norm_type, _name_of(process_group, "process_group"), *lies)
    sets = _alike.sets
    known = sets.get(key)
    if known is None or any(isinstance(t, FakeTensor) for t in gradients):
        known = ParameterSet(AsCalled(norm_type), keep=False, options={"norm_type": norm_type})
        if not any(isinstance(t, FakeTensor) for t in gradients):  # nothing of a fake mode outlives it
            sets[key] = known
            if len(sets) > _MOST_ALIKE:
                sets.popitem(last=False)
    if key in sets:
        sets.move_to_end(key)
    known.groups = None, process_group
    return known


def _name_of(group: dist.ProcessGroup | DeviceMesh | None, argument: str) -> str | None:
    return None if group is None else Axis.along(group, argument).group_name


def _forget() -> None:
    """In a process that has been forked, perhaps while another thread held the locks."""
    global _lock
    _lock = threading.Lock()
    _known.clear()
    _order.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
