"""Norms gathered during backward: each gradient is measured as soon as it is final.

With each goes what tells, at the clip, whether it is still what was measured: the object that ``.grad``
held, where its elements lay, its version, and on the CPU the proof that nothing has written there since, by
whatever name (``_writes``). All of it is noted when a gradient is measured, not later, so nothing that
happens in backward after that can pass for measured; and what does not tell this any more is measured at the
clip. So the norm is that of ``.grad`` as it is then, whatever accumulates into it, replaces it or takes it
away.

What is written outside torch's kernels is beyond this: through a NumPy array or a raw pointer that was taken
before. And accelerators have no such proof, only versions, which ``p.grad.data``, ``GradScaler.unscale_`` and
collectives pass by: there a few elements of some gradients are kept too, and where these have changed, the
norm becomes NaN (the host would have to wait to know). ``torch.autograd.graph.increment_version(p.grad)``
tells.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip import kernels
from distclip.decide.transfer import on_device
from distclip.layout.averaging import Action, averaging_of
from distclip.layout.memory import MEASURABLE, Region, lie_apart
from distclip.layout.placement import MANAGED
from distclip.layout.synchronisation import wrappers
from distclip.measure.reduction import is_offloaded, local_of
from distclip.planning.plan import Plan
from distclip.torch_private.writes import Mark, addresses, can_be_proven, is_marked, mark

_BATCH = 1 << 20  # elements that are measured in one go
_SAMPLED = 4  # gradients, 16 elements of each

_gradient = attrgetter("grad")
_version = attrgetter("_version")
_kind = attrgetter("layout", "dtype", "is_nested", "is_meta", "is_quantized")

logger = logging.getLogger("distclip")


class Overlap:
    """Measures the gradients of a plan while backward runs.

    Taken as they arrive: gradients of DTensors (FSDP2 after its reduce-scatter), of the DDP modules in
    ``modules`` after their all-reduce, and of plain parameters in a world of one rank. Whatever else there is
    (FSDP1, gradients offloaded to the CPU, sparse ones, plain parameters whose synchronisation nobody can
    see, DDP with a communication hook of the script's own) is measured at the clip.

    Attributes:
        listens: whether any gradient is taken as it arrives.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[Tensor],
        modules: Sequence[nn.Module],
        norm_type: float,
        accumulate: torch.dtype,
    ) -> None:
        self._parameters = [tensors[i] for i in plan.positions]
        self._norm_type, self._accumulate, self._device = norm_type, accumulate, plan.device
        self._wide = plan.wide and bool(kernels.distance(norm_type))
        n = len(self._parameters)
        with torch.inference_mode(mode=False):  # it is written to outside as well
            self._sums = torch.zeros(n, dtype=torch.float64, device=plan.device)
        self._counted = [False] * n  # whether the sum may be more than 0
        # Of what has been measured, by parameter:
        self._measured: list[Callable[[], Tensor | None]] = [_nothing] * n  # the gradient, while it lives
        self._addresses, self._sizes = [0] * n, [0] * n  # the first byte, and bytes up to the last
        self._versions, self._outer_versions = [0] * n, [0] * n
        self._marks: list[Mark | None] = [None] * n
        # Arrived and not measured yet, by the stream that brings them: FSDP2 has one for each kind of
        # reduction, and what is measured there waits for no other.
        self._arrived: defaultdict[Hashable, _Batch] = defaultdict(_Batch)
        self._expected: defaultdict[int, list[_Expected]] = defaultdict(list)  # by backward pass
        self._queued: set[int] = set()  # backward passes
        self._sampled: list[tuple[int, Tensor]] = []
        self._sharded = {i for i, p in enumerate(self._parameters) if isinstance(p, DTensor)}
        self._placements = [p.torch_placements for p in plan.placements]
        self._specs: list[Any] = [None] * n  # that were found to be in order
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._handles: list[Any] = []
        self._listening_to: list[weakref.WeakSet[Any]] = []
        self._listen(modules)
        # Hooks refer to this weakly: they go with it.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def _listen(self, modules: Sequence[nn.Module]) -> None:
        me = weakref.ref(self)
        under_ddp: set[int] = set()
        heard: set[int] = set()
        for module in wrappers(modules):
            if isinstance(module, DistributedDataParallel):
                of_module = {id(p) for p in module.parameters()}
                under_ddp |= of_module
                try:
                    averaging = averaging_of(module)
                except ValueError as taken:
                    _say_once(module, f"overlap=True: gradients are measured after backward: {taken}")
                    continue
                averaging.listeners.add(self)
                self._listening_to.append(averaging.listeners)
                heard |= of_module
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        for i, parameter in enumerate(self._parameters):
            final = isinstance(parameter, DTensor) or (alone and not hasattr(parameter, MANAGED))
            # (Under a hook, FSDP2 would wait for the copy of each.)
            final = final and not is_offloaded(parameter)
            if final and id(parameter) not in under_ddp and parameter.requires_grad:
                hook = _after_accumulation(me, i)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        self.listens = bool(self._handles) or not heard.isdisjoint(self._index)

    def remove(self) -> None:
        """Take the hooks away. (That of DDP cannot be: it goes on as DDP's own all-reduce.)"""
        for listeners in self._listening_to:
            listeners.discard(self)
        self._listening_to.clear()
        _remove_all(self._handles)
        self.forget()

    # --- in backward -----------------------------------------------------------------------------------

    def arrive(self, i: int) -> None:
        """Gradient i is final, unless backward goes on to add to it, or other hooks of its parameter change
        it: so what has arrived before is measured now, and this one once another has come.
        """
        if torch._C._current_graph_task_id() == -1:  # FSDP2 in a pipeline stage reduces after backward
            self._measured[i] = _nothing
            return
        gradient = self._parameters[i].grad
        if gradient is None:
            return
        local = local_of(gradient)
        stream = _current_stream(local)
        if self._arrived[stream].elements >= _BATCH:
            self._measure_batch(self._arrived.pop(stream))
        batch = self._arrived[stream]
        batch.parameters.append(i)
        batch.elements += local.numel()
        self._queue()

    def expect(self, bucket: dist.GradBucket) -> Action | None:
        """DDP is about to average these gradients."""
        if torch._C._current_graph_task_id() == -1 or bucket.buffer().layout is not torch.strided:
            return None  # a sparse one is measured at the clip
        parameters = bucket.parameters()
        places = [(n, self._index[id(p)]) for n, p in enumerate(parameters) if id(p) in self._index]
        if not places:
            return None
        of = [i for _, i in places]
        for i in of:
            self._measured[i] = _nothing
        there = [i for i in of if self._parameters[i].grad is not None]
        before = dict(zip(there, _states_of([self._parameters[i].grad for i in there]), strict=True))
        expected = _Expected([n for n, _ in places], of, before)
        self._expected[self._queue()].append(expected)
        return partial(self._measure_bucket, expected)

    def _measure_bucket(self, expected: _Expected, bucket: dist.GradBucket) -> None:
        gradients = bucket.gradients()
        averaged = [gradients[n] for n in expected.places]
        # DDP brings them into ``.grad`` at the end of backward: not before then are they what was measured.
        self._measure(expected.parameters, averaged)
        expected.averaged = [
            (place, g._version, g.dtype, g.numel())
            for g, place in zip(averaged, addresses(averaged), strict=True)
        ]

    def _queue(self) -> int:
        """Have what has arrived measured at the end of this backward pass. Returns which that is."""
        task: int = torch._C._current_graph_task_id()
        if task not in self._queued:
            self._queued.add(task)
            # Twice, because DDP puts the gradients in their place in such a callback of its own.
            _at_the_end(lambda: _at_the_end(partial(self._finish, task)))
        return task

    def _finish(self, task: int) -> None:
        self._queued.discard(task)
        # Backward waits for the streams of its nodes, and FSDP2 for its own, before this is called.
        while self._arrived:
            self._measure_batch(self._arrived.popitem()[1])
        for expected in self._expected.pop(task, ()):
            self._note_averaged(expected)
        uncertain = [i for i, m in enumerate(self._marks) if m is None and self._measured[i] is not _nothing]
        if uncertain:
            self._sample(uncertain)

    def _measure_batch(self, batch: _Batch) -> None:
        arrived = [i for i in dict.fromkeys(batch.parameters) if self._parameters[i].grad is not None]
        self._measure_and_note(arrived, [self._parameters[i].grad for i in arrived])

    def _note_averaged(self, expected: _Expected) -> None:
        """Those gradients of a bucket that are now, to the last element, what DDP has averaged."""
        if expected.averaged is None:
            return
        there = [i for i in expected.before if self._parameters[i].grad is not None]
        gradients: list[Any] = [self._parameters[i].grad for i in there]
        states = dict(zip(there, zip(gradients, _states_of(gradients), strict=True), strict=True))
        same: list[tuple[int, Tensor]] = []
        for i, averaged in zip(expected.parameters, expected.averaged, strict=True):
            if i not in states:
                continue
            before, (gradient, now) = expected.before[i], states[i]
            local = local_of(gradient)
            if now.gradient is not before.gradient or not _is_simple(local):
                continue
            place, version, dtype, numel = averaged
            if local.dtype != dtype or local.numel() != numel:
                continue
            is_bucket = now.address == place and now.version == version
            # Else DDP has copied it there, in one operation, and nothing else has written.
            is_copy = now.address == before.address != place and now.version == before.version + 1
            if is_bucket or is_copy:
                same.append((i, gradient))
        self._note(same)

    # --- measuring -------------------------------------------------------------------------------------

    def _measure_and_note(self, parameters: Sequence[int], gradients: Sequence[Any]) -> None:
        """Measures those that can be; the others count as not measured."""
        noted: list[tuple[int, Tensor]] = []
        for i, gradient in zip(parameters, gradients, strict=True):
            self._measured[i] = _nothing
            if _is_simple(local_of(gradient)) and self._lies_as_its_parameter(i, gradient):
                noted.append((i, gradient))
        self._note(noted)
        try:
            self._measure(parameters, gradients)
        except BaseException:
            self.forget()
            raise

    def _note(self, gradients: Sequence[tuple[int, Tensor]]) -> None:
        """These are what is measured. Before they are read: what is written later can be told then."""
        locals_ = [local_of(gradient) for _, gradient in gradients]
        for (i, gradient), local, place in zip(gradients, locals_, addresses(locals_), strict=True):
            if local.is_inference():  # has no version
                continue
            found = mark(local) if can_be_proven(local) else None
            if found is None and can_be_proven(local):
                continue
            self._marks[i] = found
            self._addresses[i], self._sizes[i] = place, _size_of(local)
            self._versions[i], self._outer_versions[i] = local._version, gradient._version
            # (A DTensor that is referred to weakly could not be swapped: module.to() does that.)
            self._measured[i] = weakref.ref(local)

    @torch.no_grad()
    def _measure(self, parameters: Sequence[int], gradients: Sequence[Tensor]) -> None:
        together: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        empty: list[int] = []
        for i, gradient in zip(parameters, gradients, strict=True):
            local = local_of(gradient)
            if not _is_simple(local):
                continue
            if not local.numel():
                empty.append(i)
                continue
            members, tensors = together.setdefault((local.device, local.dtype), ([], []))
            members.append(i)
            tensors.append(local)
            self._counted[i] = True
        for members, tensors in together.values():
            self._put(members, kernels.power_sums(tensors, self._norm_type, self._accumulate))
        self._put_zero(empty)

    def _put(self, parameters: Sequence[int], sums: Tensor) -> None:
        key = tuple(parameters)
        if key not in self._indices:
            if len(self._indices) >= 1024:
                self._indices.clear()
            self._indices[key] = on_device(key, torch.int64, self._device)
        self._sums.index_copy_(0, self._indices[key], sums.to(self._device))

    def _put_zero(self, parameters: Sequence[int]) -> None:
        gone = [i for i in parameters if self._counted[i]]
        if gone:
            self._put(gone, torch.zeros(len(gone), dtype=torch.float64, device=self._device))
            for i in gone:
                self._counted[i] = False

    # --- at the clip -----------------------------------------------------------------------------------

    def forget(self) -> None:
        """The gradients have been changed: what was measured counts no more."""
        self._measured = [_nothing] * len(self._measured)
        self._sampled = []

    @torch.no_grad()
    def sums(self) -> Tensor | None:
        """``Σ|g|^p`` (``max|g|``) of this rank's part of each gradient as it is, [num_parameters] float64.

        None where gradients share memory, are no plain strided tensors, have yet to be summed, or are float64
        and their sums may be more than that holds: those are collected and measured in the usual way.
        """
        if torch.compiler.is_compiling():
            return None
        # Of a backward pass that raised there may be some left.
        self._arrived.clear()
        self._expected.clear()
        self._queued.clear()
        gradients: list[Any] = list(map(_gradient, self._parameters))
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found = gradients if len(there) == len(gradients) else [gradients[i] for i in there]
        locals_ = list(map(local_of, found)) if self._sharded else found
        measured = [then() for then in self._of(there, self._measured)]
        replaced = []
        if not all(map(is_, measured, locals_)):
            replaced = [i for i, then, now in zip(there, measured, locals_, strict=True) if then is not now]
            if not all(_is_simple(local_of(gradients[i])) for i in replaced):
                return None
        places = addresses(locals_)
        if replaced:
            new = set(replaced)
            kept = [n for n, i in enumerate(there) if i not in new]
            same: list[list[Any]] = [[column[n] for n in kept] for column in (there, found, locals_, places)]
            changed = sorted([*replaced, *self._written(*same)])
        else:
            changed = self._written(there, found, locals_, places)
        untouched = self._untouched(set(changed)) if self._sampled else True
        if untouched is False:
            self.forget()
            changed = there
        if len(there) < len(gradients):
            self._put_zero([i for i, gradient in enumerate(gradients) if gradient is None])
        anew = [gradients[i] for i in changed]
        for i, gradient in zip(changed, anew, strict=True):
            self._sizes[i] = _size_of(local_of(gradient))
        apart = _lie_apart(places, self._of(there, self._sizes))
        if not apart or not all(map(self._lies_as_its_parameter, changed, anew)):
            return None
        if changed:
            self._measure_and_note(changed, anew)
        if self._wide:  # of sums that float64 does not hold, others are needed
            largest = kernels.look(self._sums.amax()) if self._sums.numel() else [0.0]
            if largest is None or not largest[0] < math.inf:
                return None
        return torch.where(untouched, self._sums, torch.nan) if isinstance(untouched, Tensor) else self._sums

    def _written(
        self, there: list[int], gradients: list[Any], locals_: list[Any], places: list[int]
    ) -> list[int]:
        """Those of ``there`` that may not hold what was measured. Mostly in loops inside Python's C code."""
        marks = self._of(there, self._marks)
        columns = [places, list(map(_version, locals_))]
        noted = [self._of(there, self._addresses), self._of(there, self._versions)]
        if self._sharded:  # operators on a DTensor change its own version, others that of its local tensor
            columns.append(list(map(_version, gradients)))
            noted.append(self._of(there, self._outer_versions))
        proven = all(mark is not None and mark.holds for mark in set(marks))
        if columns == noted and proven and all(map(is_marked, locals_)):
            return []
        now, then = zip(*columns, strict=True), zip(*noted, strict=True)
        return [
            i
            for i, local, mark, state, before in zip(there, locals_, marks, now, then, strict=True)
            if state != before or not (mark is None or (mark.holds and is_marked(local)))
        ]

    def _of(self, there: list[int], column: list[Any]) -> list[Any]:
        return column if len(there) == len(column) else [column[i] for i in there]

    def _lies_as_its_parameter(self, i: int, gradient: Any) -> bool:
        if i in self._sharded and gradient._spec is not self._specs[i]:
            if gradient._spec.placements != self._placements[i]:
                return False
            self._specs[i] = gradient._spec
        return True

    # --- samples, where there is no proof --------------------------------------------------------------

    @torch.no_grad()
    def _sample(self, uncertain: Sequence[int]) -> None:
        chosen = uncertain[:: max(1, len(uncertain) // _SAMPLED)]
        there = [(i, self._parameters[i].grad) for i in chosen]
        self._sampled = [(i, _some_of(g).clone()) for i, g in there if g is not None]

    def _untouched(self, changed: set[int]) -> Tensor | bool:
        """Whether the samples of the gradients that seem unchanged are; on an accelerator as [] bool."""
        kept = [
            (sample, _some_of(gradient))
            for i, sample in self._sampled
            if i not in changed and (gradient := self._parameters[i].grad) is not None
        ]
        if not kept:
            return True
        # Their bytes: NaN is no other NaN.
        now = torch.cat([elements.view(torch.uint8) for _, elements in kept])
        then = torch.cat([sample.view(torch.uint8) for sample, _ in kept])
        return torch.equal(now, then) if now.is_cpu else (now == then).all()


def _size_of(local: Tensor) -> int:
    """Bytes from its first element to its last."""
    if local.is_contiguous():
        return local.numel() * local.element_size()
    region = Region.of(local)
    return region.end - region.begin


def _lie_apart(places: list[int], sizes: list[int]) -> bool:
    """Whether no gradient shares memory with another, as far as that is quickly told."""
    if 0 in sizes:  # empty ones may lie anywhere
        places = [place for place, size in zip(places, sizes, strict=True) if size]
        sizes = list(filter(None, sizes))
    return lie_apart(places, sizes)


@dataclass(eq=False)
class _Batch:
    parameters: list[int] = field(default_factory=list)
    elements: int = 0


class _State(NamedTuple):
    gradient: weakref.ref[Tensor]
    address: int
    version: int


@dataclass(eq=False)
class _Expected:
    """A bucket of DDP on its way.

    Attributes:
        places, parameters: of the gradients in it that count: where each stands in it, and whose it is.
        before: of those that this rank has, by parameter, their state before they are averaged.
        averaged: of each, once it is: address, version, dtype, number of elements.
    """

    places: list[int]
    parameters: list[int]
    before: dict[int, _State]
    averaged: list[tuple[int, int, torch.dtype, int]] | None = None


def _nothing() -> None:
    """In place of the reference to a gradient that was measured."""


def _states_of(gradients: Sequence[Any]) -> list[_State]:
    locals_ = list(map(local_of, gradients))
    return list(map(_State, map(weakref.ref, gradients), addresses(locals_), map(_version, locals_)))


def _current_stream(tensor: Tensor) -> Hashable:
    device = tensor.device
    return None if tensor.is_cpu else (device.index, torch.accelerator.current_stream(device).stream_id)


def _is_simple(local: Tensor) -> bool:
    return (
        type(local) is Tensor and _is_simple_kind(*_kind(local)) and not (local.is_conj() or local.is_neg())
    )


@lru_cache(maxsize=256)
def _is_simple_kind(
    layout: torch.layout, dtype: torch.dtype, is_nested: bool, is_meta: bool, is_quantized: bool
) -> bool:
    strided = layout is torch.strided and not (is_nested or is_meta or is_quantized)
    return strided and dtype in MEASURABLE


def _some_of(gradient: Tensor) -> Tensor:
    """[≤ 16]: a view of the elements of a gradient that are kept."""
    some = local_of(gradient)
    if some.is_contiguous():
        return some.as_strided((min(16, some.numel()),), (1,))
    while some.dim() > 1:
        some = some.select(0, 0)
    return some[:16]


def _after_accumulation(me: weakref.ref[Overlap], i: int) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        overlap = me()
        if overlap is not None:
            overlap.arrive(i)

    return hook


def _remove_all(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _say_once(module: nn.Module, message: str) -> None:
    if module not in _said:
        _said.add(module)
        logger.warning(message)


def _at_the_end(callback: Callable[[], None]) -> None:
    """Of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
