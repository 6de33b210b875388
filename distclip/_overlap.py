"""Norms gathered during backward: each gradient is measured as soon as it is final.

What has been measured is kept with the gradient's address and version. Only what still has both at the clip
is used, the rest is measured then, so that the norm is that of the gradients as they are, whatever
accumulates into them or puts others in their place. But ``GradScaler.unscale_`` and collectives change
gradients without a new version: a few elements are kept too, and where these have changed everything is
measured anew (on an accelerator, where the host would have to wait to know, the norm becomes NaN).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip import _kernels as kernels
from distclip._placement import MANAGED
from distclip._plan import Plan
from distclip._reduction import is_offloaded, local_of
from distclip._synchronisation import wrappers
from distclip._transfer import on_device

_BATCH = 1 << 20  # elements that are measured in one go
_SAMPLED = 4  # gradients, 16 elements of each
_NOTHING = (0, -1)  # in place of the address and the version of a gradient that is not there

_gradient = attrgetter("grad")
_local = attrgetter("_local_tensor")
_version = attrgetter("_version")


class Overlap:
    """Measures the gradients of a plan while backward runs.

    Taken as they arrive: gradients of DTensors (FSDP2 after its reduce-scatter), of the DDP modules in
    ``modules`` after their all-reduce, and of plain parameters in a world of one rank. Whatever else there is
    (FSDP1, gradients offloaded to the CPU, plain parameters whose synchronisation nobody can see) is measured
    at the clip.
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
        self._sums = torch.zeros(len(self._parameters), dtype=torch.float64, device=plan.device)
        self._seals: list[tuple[int, int]] = [_NOTHING] * len(self._parameters)
        # Not measured yet, by the stream that brings them: FSDP2 has one for each kind of reduction, and what
        # is measured there waits for no other.
        self._arrived: defaultdict[Hashable, _Batch] = defaultdict(_Batch)
        self._unsealed: list[int] = []  # measured or not
        self._sampled: list[tuple[int, Tensor]] = []
        self._sealed: _Sealed | None = None
        self._sharded = {i: None for i, p in enumerate(self._parameters) if isinstance(p, DTensor)}
        self._placements = [p.torch_placements for p in plan.placements]
        self._specs: list[Any] = [None] * len(self._parameters)  # that were found to be in order
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._handles: list[Any] = []
        self._listening_to: list[weakref.ref[DistributedDataParallel]] = []
        self._queued = False
        self._listen(modules)

    def _listen(self, modules: Sequence[nn.Module]) -> None:
        """Sets ``self.listens``: whether any gradient will be taken as it arrives."""
        me = weakref.ref(self)
        under_ddp: set[int] = set()
        index = {id(p): i for i, p in enumerate(self._parameters)}
        self._index = index
        for module in wrappers(modules):
            if isinstance(module, DistributedDataParallel):
                under_ddp |= {id(p) for p in module.parameters()}
                if module not in _listeners:  # DDP takes one hook, once and for all
                    of_module: weakref.WeakSet[Overlap] = weakref.WeakSet()
                    module.register_comm_hook(None, _after_all_reduce(of_module, module.process_group))
                    _listeners[module] = of_module
                _listeners[module].add(self)
                self._listening_to.append(weakref.ref(module))
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        for i, parameter in enumerate(self._parameters):
            final = isinstance(parameter, DTensor) or (alone and not hasattr(parameter, MANAGED))
            # (Under a hook, FSDP2 would wait for the copy of each.)
            final = final and not is_offloaded(parameter)
            if final and id(parameter) not in under_ddp and parameter.requires_grad:
                hook = _after_accumulation(me, i)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        self.listens = bool(self._handles) or not under_ddp.isdisjoint(index)

    def remove(self) -> None:
        """Take the hooks away. (That of DDP cannot be: it goes on as DDP's own all-reduce.)"""
        for module in filter(None, (ref() for ref in self._listening_to)):
            _listeners[module].discard(self)
        self._listening_to.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def arrive(self, i: int) -> None:
        """Gradient i is final, unless backward goes on to add to it."""
        if torch._C._current_graph_task_id() == -1:  # FSDP2 in a pipeline stage reduces after backward
            self._seals[i], self._sealed = _NOTHING, None
            return
        gradient = self._parameters[i].grad
        if gradient is None:
            return
        self._unsealed.append(i)
        local = local_of(gradient)
        stream = _current_stream(local)
        batch = self._arrived[stream]
        batch.parameters.append(i)
        batch.elements += local.numel()
        if batch.elements >= _BATCH:
            self._measure_batch(self._arrived.pop(stream))
        self.queue()

    def queue(self) -> None:
        """Have what has arrived sealed at the end of this backward pass."""
        if not self._queued:
            self._queued = True
            # Twice, because DDP puts the gradients in their place in such a callback of its own.
            _at_the_end(lambda: _at_the_end(self._seal))

    def expect(self, bucket: Sequence[Tensor]) -> None:
        """The gradients of these parameters are being all-reduced, and then measured: to be sealed."""
        self._unsealed.extend(self._index[id(p)] for p in bucket if id(p) in self._index)
        self.queue()

    def measure(self, bucket: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The all-reduce has left these gradients."""
        mine = [
            (self._index[id(p)], g) for p, g in zip(bucket, gradients, strict=True) if id(p) in self._index
        ]
        self._measure([i for i, _ in mine], [g for _, g in mine])

    def _seal(self) -> None:
        self._queued = False
        # Backward waits for the streams of its nodes, and FSDP2 for its own, before this is called.
        while self._arrived:
            self._measure_batch(self._arrived.popitem()[1])
        for i in self._unsealed:
            gradient = self._parameters[i].grad
            in_order = self._lie_as_their_parameters([gradient], [i])
            self._seals[i] = _seal_of(gradient) if in_order else _NOTHING
        self._unsealed.clear()
        sealed = [i for i, seal in enumerate(self._seals) if seal != _NOTHING]
        self._sealed = _Sealed.of(self._seals, sealed, [i for i in sealed if i in self._sharded])
        chosen = sealed[:: max(1, len(sealed) // _SAMPLED)]
        with torch.no_grad():
            self._sampled = [(i, _sample(self._parameters[i].grad).clone()) for i in chosen]

    def forget(self) -> None:
        """The gradients have been changed."""
        self._seals = [_NOTHING] * len(self._seals)
        self._sampled, self._sealed = [], None

    def _measure_batch(self, batch: _Batch) -> None:
        arrived = list(dict.fromkeys(batch.parameters))
        self._measure(arrived, [self._parameters[i].grad for i in arrived])

    @torch.no_grad()
    def _measure(self, parameters: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        together: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        for i, gradient in zip(parameters, gradients, strict=True):
            local = None if gradient is None else local_of(gradient)
            if local is not None and _is_simple(local) and local.numel():
                members, tensors = together.setdefault((local.device, local.dtype), ([], []))
                members.append(i)
                tensors.append(local)
        for members, tensors in together.values():
            self.put(members, kernels.power_sums(tensors, self._norm_type, self._accumulate))

    def put(self, parameters: Sequence[int], sums: Tensor) -> None:
        key = tuple(parameters)
        if key not in self._indices:
            if len(self._indices) >= 1024:
                self._indices.clear()
            self._indices[key] = on_device(key, torch.int64, self._device)
        self._sums.index_copy_(0, self._indices[key], sums.to(self._device))

    def sums(self) -> Tensor | None:
        """``Σ|g|^p`` (``max|g|``) of this rank's part of each gradient as it is, [num_parameters] float64.

        None where gradients share memory, are no plain strided tensors or have yet to be summed: those are
        collected and measured in the usual way.
        """
        if torch.compiler.is_compiling():
            return None
        untouched = self._untouched()
        if untouched is False:
            self.forget()
        gradients: list[Any] = list(map(_gradient, self._parameters))
        if self._sealed is None or not self._sealed.holds(gradients):
            if not self._measure_changed(gradients):
                return None
            return self._sums
        return torch.where(untouched, self._sums, torch.nan) if isinstance(untouched, Tensor) else self._sums

    def _measure_changed(self, gradients: Sequence[Any]) -> bool:
        """Bring the sums up to date; False where they cannot be."""
        self._sampled, self._sealed = [], None
        if not self._lie_as_their_parameters(gradients):
            return False
        locals_ = [None if g is None else local_of(g) for g in gradients]
        present = [local for local in locals_ if local is not None and local.numel()]
        if not all(map(_is_simple, present)):
            return False
        if len({local.data_ptr() for local in present}) < len(present):
            return False
        seals = [_seal_of(gradient) for gradient in gradients]
        changed = [i for i, (new, old) in enumerate(zip(seals, self._seals, strict=True)) if new != old]
        self.put(changed, torch.zeros(len(changed), dtype=torch.float64, device=self._device))
        self._measure(changed, [gradients[i] for i in changed])
        self._seals = seals
        return True

    def _lie_as_their_parameters(
        self, gradients: Sequence[Any], parameters: Sequence[int] | None = None
    ) -> bool:
        for i, gradient in zip(parameters or range(len(gradients)), gradients, strict=True):
            if i in self._sharded and gradient is not None and gradient._spec is not self._specs[i]:
                if gradient._spec.placements != self._placements[i]:
                    return False
                self._specs[i] = gradient._spec
        return True

    def _untouched(self) -> Tensor | bool:
        """Whether the samples of the gradients that seem unchanged are; on an accelerator as [] bool."""
        kept = [
            (i, then) for i, then in self._sampled if _seal_of(self._parameters[i].grad) == self._seals[i]
        ]
        if not kept:
            return True
        # Their bytes: NaN is no other NaN.
        now = torch.cat([_sample(self._parameters[i].grad) for i, _ in kept]).view(torch.uint8)
        then = torch.cat([sample for _, sample in kept]).view(torch.uint8)
        return torch.equal(now, then) if now.is_cpu else (now == then).all()


@dataclass(eq=False)
class _Batch:
    parameters: list[int] = field(default_factory=list)
    elements: int = 0


@dataclass(frozen=True, eq=False)
class _Sealed:
    """The seals as columns, to be compared in loops inside Python's C code.

    Attributes:
        present: gradients with elements on this rank, DTensors first; of these, num_sharded are.
        absent: the others.
    """

    present: list[int]
    num_sharded: int
    absent: list[int]
    addresses: list[int]
    versions: list[int]

    @staticmethod
    def of(seals: Sequence[tuple[int, int]], sealed: Sequence[int], sharded: Sequence[int]) -> _Sealed | None:
        first = set(sharded)
        present = [*sharded, *(i for i in sealed if i not in first)]
        addresses = [seals[i][0] for i in present]
        if len(set(addresses)) < len(addresses):
            return None
        absent = [i for i, seal in enumerate(seals) if seal == _NOTHING]
        return _Sealed(present, len(sharded), absent, addresses, [seals[i][1] for i in present])

    def holds(self, gradients: Sequence[Any]) -> bool:
        for i in self.absent:
            if gradients[i] is not None and local_of(gradients[i]).numel():
                return False
        found = [gradients[i] for i in self.present]
        n = self.num_sharded
        try:
            locals_: list[Any] = [*map(_local, found[:n]), *found[n:]]
            return (
                list(map(Tensor.data_ptr, locals_)) == self.addresses
                and list(map(_version, locals_)) == self.versions
            )
        except (AttributeError, TypeError, RuntimeError):  # None, or no plain tensor any more
            return False


# Who listens to the all-reduces of a DDP module.
_listeners: weakref.WeakKeyDictionary[DistributedDataParallel, weakref.WeakSet[Overlap]] = (
    weakref.WeakKeyDictionary()
)


def _current_stream(tensor: Tensor) -> Hashable:
    device = tensor.device
    return None if tensor.is_cpu else (device.index, torch.accelerator.current_stream(device).stream_id)


def _is_simple(local: Tensor) -> bool:
    return type(local) is Tensor and local.layout is torch.strided


def _seal_of(gradient: Tensor | None) -> tuple[int, int]:
    local = None if gradient is None else local_of(gradient)
    if local is None or not _is_simple(local) or not local.numel():
        return _NOTHING
    return local.data_ptr(), local._version


def _sample(gradient: Tensor | None) -> Tensor:
    """[≤ 16]: a view of the elements of a gradient that are kept."""
    assert gradient is not None
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


def _after_all_reduce(
    listeners: weakref.WeakSet[Overlap], group: dist.ProcessGroup
) -> Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        parameters, gradients, here = bucket.parameters(), bucket.gradients(), list(listeners)
        for overlap in here:
            overlap.expect(parameters)

        def measure(future: torch.futures.Future[Tensor]) -> Tensor:
            for overlap in here:
                overlap.measure(parameters, gradients)
            return future.value()

        reduced = allreduce_hook(group, bucket)
        return reduced.then(measure) if here else reduced

    hook.__annotations__.clear()  # DDP refuses them as strings
    return hook


def _at_the_end(callback: Callable[[], None]) -> None:
    """Of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
