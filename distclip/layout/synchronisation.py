"""Whether DDP or FSDP synchronises gradients: turning that off for a while, and noticing that it was off.

Which flags are set is the program's doing and so the same on every rank.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.layout.parameters import ddp_modules
from distclip.layout.placement import MANAGED, Axis


def wrappers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost DDP, FSDP1 and FSDP2 modules in ``modules``."""
    found: list[nn.Module] = []
    waiting = list(modules)
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, DistributedDataParallel) or is_fsdp1(module) or is_fsdp2(module):
            found.append(module)
        else:
            waiting[:0] = module.children()
    return found


def is_fsdp1(module: nn.Module) -> bool:
    if "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules:
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def is_fsdp2(module: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


class _Weak:
    """Of some objects those that still live."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._references = list(map(weakref.ref, items))

    def __iter__(self) -> Iterator[Any]:
        return (item for item in (reference() for reference in self._references) if item is not None)


class Synchronisation:
    """What synchronises the gradients of some parameters, found once.

    Args:
        modules: those that are known.
        tensors: the parameters. Where these are lists, or what a wrapper wraps, the wrapper is found all the
            same: DDP by the garbage collector (tens of milliseconds, only where ranks hold plain parameters
            that no known module synchronises), FSDP2 by torch's own register.
        keep: whether the modules may be kept alive.
    """

    def __init__(
        self, modules: Sequence[nn.Module], tensors: Sequence[Tensor] = (), *, keep: bool = True
    ) -> None:
        known = wrappers(modules)
        everyone = [*known, *_others(known, tensors)]
        held: Callable[[list[Any]], Iterable[Any]] = (lambda items: items) if keep else _Weak
        groups = [g for m in everyone if is_fsdp2(m) for g in _fsdp2_groups(m)]
        self._wrappers = held(known)
        self._ddp = held([m for m in everyone if isinstance(m, DistributedDataParallel)])
        self._fsdp1 = held([m for m in known if is_fsdp1(m)])
        self._groups = held(groups)
        # One parameter that trains tells for its whole FSDP2 group.
        witnesses = [
            next((p for p in group.fsdp_params if p.sharded_param.requires_grad), None) for group in groups
        ]
        self._witnesses = held([p for p in witnesses if p is not None])
        self._own = {id(t) for t in tensors}
        # When, in the last backward pass that DDP synchronised, which gradient was there.
        self._synchronised: weakref.WeakKeyDictionary[DistributedDataParallel, list[int]]
        self._synchronised = weakref.WeakKeyDictionary()

    def averaged(self) -> dict[int, Axis]:
        """By the id of a parameter that DDP averages, the group that it does so over."""
        found: dict[int, Axis] = {}
        for module in self._ddp:
            axis = Axis.along(module.process_group, "process_group")
            found |= {id(p): axis for p in _averaged_by(module) if id(p) in self._own}
        return found

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Forward and backward passes in here leave gradients on their own ranks."""
        with contextlib.ExitStack() as stack:
            for module in self._wrappers:
                if is_fsdp2(module):
                    toggle: Any = module.set_requires_gradient_sync
                    toggle(False)
                    stack.callback(toggle, True)
                else:
                    no_sync: Any = module.no_sync
                    stack.enter_context(no_sync())
            yield

    def joins(self) -> bool:
        """Whether a rank that has run out of batches may be absent, as torch's ``Join`` lets it (and goes on
        doing after its ``with`` block, by what it leaves on DDP)."""
        configs = [getattr(m, "_join_config", None) for m in self._ddp]
        return any(c is not None and c.enable and not c.throw_on_early_termination for c in configs)

    def own_gradients(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What this rank has accumulated of the gradients of ``tensors`` and, where they are synchronised at
        all, not synchronised yet, in tensors to be changed in place."""
        sharded = [p for group in self._groups for p in group.fsdp_params]
        elsewhere = {id(p.sharded_param) for p in sharded} | {
            id(t) for module in self._fsdp1 for t in module.parameters()
        }
        found = [t.grad for t in tensors if id(t) not in elsewhere]
        for p in sharded:
            unsharded = getattr(p, "_unsharded_param", None)
            found += [None if unsharded is None else unsharded.grad, p.unsharded_accumulated_grad]
        for module in self._fsdp1:
            found += [h.flat_param.grad for h in _handles(module) if h.flat_param is not None]
        return list({id(g): g for g in found if g is not None}.values())

    def was_off(self, tensors: Sequence[Tensor]) -> str | None:
        """``"DDP"``, ``"FSDP1"`` or ``"FSDP2"`` if its gradients may not be synchronised, else None.

        For FSDP this is certain. DDP only remembers its last forward pass, and when the last backward pass
        that it synchronised had which gradient: there the gradients themselves must be compared.

        Args:
            tensors: the parameters that FSDP1 manages. Without synchronisation it leaves the whole flat
                gradient on a shard; torch itself never has another shape there.
        """
        if self._ddp_was_off():
            return "DDP"
        if any(map(_accumulated, self._witnesses)) or any(map(_holds_unsharded_gradient, self._witnesses)):
            return "FSDP2"
        if any(map(_partly_reduced, self._groups)):
            return "FSDP2"  # hybrid sharding, after set_requires_all_reduce(False)
        if any(t.grad is not None and t.grad.shape != t.shape for t in tensors):
            return "FSDP1"
        if any(not m._sync_gradients for m in self._fsdp1):
            return "FSDP1"  # NO_SHARD, whose gradients do not tell, still in no_sync()
        return None

    def _ddp_was_off(self) -> bool:
        """Whether DDP has synchronised nothing since the last call (before the first: ever), and its last
        forward pass said so.

        (An evaluation says so too, and some ranks may evaluate alone: it must not count.)
        """
        was_off = False
        for module in self._ddp:
            times = module.reducer.get_backward_stats() if hasattr(module, "reducer") else []
            never = [] if any(time > 0 for time in times) else times
            before = self._synchronised.get(module, never)
            self._synchronised[module] = times
            was_off = was_off or (not module.require_forward_param_sync and times == before)
        return was_off


def _handles(module: Any) -> Iterator[Any]:
    for wrapped in module.fsdp_modules(module):
        if wrapped._handle is not None:
            yield wrapped._handle


def _accumulated(parameter: Any) -> bool:
    return parameter.unsharded_accumulated_grad is not None


def _partly_reduced(group: Any) -> bool:
    return getattr(group, "_partial_reduce_output", None) is not None


def _others(known: Sequence[nn.Module], tensors: Sequence[Tensor]) -> list[nn.Module]:
    """Wrappers that are not among the known ones, of these parameters."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    own = {id(t) for t in tensors if t.requires_grad}
    covered = {id(p) for m in known for p in m.parameters()}
    found: list[nn.Module] = []
    sharded = [t for t in tensors if isinstance(t, DTensor) and id(t) not in covered]
    if sharded and "torch.distributed.fsdp" in sys.modules:
        from torch.distributed._composable_state import _module_state_mapping

        for module in list(_module_state_mapping):
            if is_fsdp2(module) and any(id(p) in own for p in module.parameters()):
                found.append(module)
    if any(
        t.requires_grad and id(t) not in covered and not isinstance(t, DTensor) and not hasattr(t, MANAGED)
        for t in tensors
    ):
        mine = (m for m in ddp_modules() if not any(m is k for k in known))
        found += [m for m in mine if any(id(p) in own for p in _averaged_by(m))]
    return found


def _averaged_by(module: DistributedDataParallel) -> Iterator[nn.Parameter]:
    """What DDP averages, and what has been put into its module since: that lives on the same ranks."""
    yield from module._module_parameters
    yield from module.parameters()


def _fsdp2_groups(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if is_fsdp2(child):
            state: Any = child._get_fsdp_state
            found = state()
            if hasattr(found, "_fsdp_param_groups"):
                yield from found._fsdp_param_groups
            elif found._fsdp_param_group is not None:  # torch < 2.13
                yield found._fsdp_param_group


def _holds_unsharded_gradient(parameter: Any) -> bool:
    unsharded = getattr(parameter, "_unsharded_param", None)
    return unsharded is not None and unsharded.grad is not None
