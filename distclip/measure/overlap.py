"""Norms gathered during backward: each gradient is measured as soon as it is final."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.layout.averaging import Action, averaging_of
from distclip.layout.placement import MANAGED
from distclip.layout.synchronisation import wrappers
from distclip.measure.bucket import Bucket
from distclip.measure.gathered import Gathered
from distclip.measure.reduction import is_offloaded, local_of
from distclip.planning.plan import Plan
from distclip.torch_private.autograd import at_the_end_of_backward, current_graph_task

_BATCH = 1 << 20  # elements that are measured in one go

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
        self._gathered = Gathered(plan, tensors, norm_type, accumulate)
        self._parameters = self._gathered.parameters
        # Arrived and not measured yet, by the stream that brings them: FSDP2 has one for each kind of
        # reduction, and what is measured there waits for no other.
        self._arrived: defaultdict[Hashable, _Batch] = defaultdict(_Batch)
        self._buckets: defaultdict[int, list[Bucket]] = defaultdict(list)  # by backward pass
        self._queued: set[int] = set()  # backward passes
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

    def forget(self) -> None:
        """The gradients have been changed: what was measured counts no more."""
        self._gathered.forget()

    def sums(self) -> Tensor | None:
        """See :meth:`Gathered.sums`."""
        if torch.compiler.is_compiling():
            return None
        # Of a backward pass that raised there may be some left.
        self._arrived.clear()
        self._buckets.clear()
        self._queued.clear()
        return self._gathered.sums()

    # --- in backward -----------------------------------------------------------------------------------

    def arrive(self, i: int) -> None:
        """Gradient i is final, unless backward goes on to add to it, or other hooks of its parameter change
        it: so what has arrived before is measured now, and this one once another has come.
        """
        if current_graph_task() == -1:  # FSDP2 in a pipeline stage reduces after backward
            self._gathered.drop(i)
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
        if current_graph_task() == -1 or bucket.buffer().layout is not torch.strided:
            return None  # a sparse one is measured at the clip
        parameters = bucket.parameters()
        places = {self._index[id(p)]: n for n, p in enumerate(parameters) if id(p) in self._index}
        if not places:
            return None
        expected = Bucket(self._gathered, places)
        self._buckets[self._queue()].append(expected)
        return expected.measure

    def _queue(self) -> int:
        """Have what has arrived measured at the end of this backward pass. Returns which that is."""
        task: int = current_graph_task()
        if task not in self._queued:
            self._queued.add(task)
            # Twice, because DDP puts the gradients in their place in such a callback of its own.
            at_the_end_of_backward(lambda: at_the_end_of_backward(partial(self._finish, task)))
        return task

    def _finish(self, task: int) -> None:
        self._queued.discard(task)
        # Backward waits for the streams of its nodes, and FSDP2 for its own, before this is called.
        while self._arrived:
            self._measure_batch(self._arrived.popitem()[1])
        for bucket in self._buckets.pop(task, ()):
            bucket.note()
        self._gathered.keep_samples()

    def _measure_batch(self, batch: _Batch) -> None:
        arrived = [i for i in dict.fromkeys(batch.parameters) if self._parameters[i].grad is not None]
        self._gathered.measure_and_note(arrived, [self._parameters[i].grad for i in arrived])


@dataclass(eq=False)
class _Batch:
    parameters: list[int] = field(default_factory=list)
    elements: int = 0


def _current_stream(tensor: Tensor) -> Hashable:
    device = tensor.device
    return None if tensor.is_cpu else (device.index, torch.accelerator.current_stream(device).stream_id)


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
