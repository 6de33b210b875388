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
from distclip.torch_private import ddp, fsdp


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
        members = [fsdp.members_of(group) for group in groups]
        self._wrappers = held(known)
        self._ddp = held([m for m in everyone if isinstance(m, DistributedDataParallel)])
        self._fsdp1 = held([m for m in known if is_fsdp1(m)])
        self._groups = held(groups)
        self._fsdp2 = held([m for m in everyone if is_fsdp2(m)])
        # One parameter that trains tells for its whole FSDP2 group.
        witnesses = [
            next((m for m in each if fsdp.sharded_parameter(m).requires_grad), None) for each in members
        ]
        self._witnesses = held([m for m in witnesses if m is not None])
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
        return any(map(ddp.lets_ranks_be_absent, self._ddp))

    def own_gradients(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What this rank has accumulated of the gradients of ``tensors`` and, where they are synchronised at
        all, not synchronised yet, in tensors to be changed in place."""
        members = [member for group in self._groups for member in fsdp.members_of(group)]
        elsewhere = {id(fsdp.sharded_parameter(member)) for member in members} | {
            id(t) for module in self._fsdp1 for t in module.parameters()
        }
        found = [t.grad for t in tensors if id(t) not in elsewhere]
        for member in members:
            found += fsdp.unsharded_gradients(member)
        for module in self._fsdp1:
            found += fsdp.flat_gradients(module)
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
        if any(map(fsdp.holds_unsharded_gradient, self._witnesses)):
            return "FSDP2"
        if any(map(fsdp.is_partly_reduced, self._groups)):
            return "FSDP2"  # hybrid sharding, after set_requires_all_reduce(False)
        if any(t.grad is not None and t.grad.shape != t.shape for t in tensors):
            return "FSDP1"
        if not all(map(fsdp.synchronises, self._fsdp1)):
            return "FSDP1"  # NO_SHARD, whose gradients do not tell, still in no_sync()
        return None

    def require(self, tensors: Sequence[Tensor]) -> str | None:
        """``"DDP"`` where the gradients have to be compared to know whether they are synchronised.
        ``tensors``: as for :meth:`was_off`.

        Raises:
            ValueError: on every rank: they are only this rank's own.
        """
        if (error := self.not_final()) is not None:
            raise error
        culprit = self.was_off(tensors)
        if culprit is not None and culprit != "DDP":
            raise ValueError(
                f"the gradients under {culprit} have not been synchronised: the last backward pass ran in "
                "no_sync() or after set_requires_gradient_sync(False). Synchronise in the last micro-batch "
                "(clipper.accumulate does), then clip."
            )
        return culprit

    def not_final(self) -> ValueError | None:
        """To be raised on every rank: gradients wait for ``finalize_backward()``, which torch has since
        2.15."""
        late = "DDP" if any(map(ddp.awaits_finalization, self._ddp)) else None
        late = late or ("FSDP2" if any(map(fsdp.awaits_finalization, self._fsdp2)) else None)
        if late is None:
            return None
        return ValueError(
            f"the gradients under {late} are not final: finalization of backward is manual, and "
            "finalize_backward() has not been called since the last backward pass (or the handle that it "
            "returned has not been waited for). Do that, then clip."
        )

    def _ddp_was_off(self) -> bool:
        """Whether DDP has synchronised nothing since the last call (before the first: ever), and its last
        forward pass said so.

        (An evaluation says so too, and some ranks may evaluate alone: it must not count.)
        """
        was_off = False
        for module in self._ddp:
            times = ddp.backward_times(module)
            never = [] if any(time > 0 for time in times) else times
            before = self._synchronised.get(module, never)
            self._synchronised[module] = times
            was_off = was_off or (not ddp.synchronises(module) and times == before)
        return was_off


def _others(known: Sequence[nn.Module], tensors: Sequence[Tensor]) -> list[nn.Module]:
    """Wrappers that are not among the known ones, of these parameters."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    own = {id(t) for t in tensors if t.requires_grad}
    covered = {id(p) for m in known for p in m.parameters()}
    found: list[nn.Module] = []
    sharded = any(isinstance(t, DTensor) and id(t) not in covered for t in tensors)
    if not own <= covered and "torch.distributed.fsdp" in sys.modules:
        for module in filter(is_fsdp2, fsdp.modules_with_state()):
            whole = fsdp.awaits_finalization(module)  # until then its parameters are plain
            if (sharded or whole) and any(id(p) in own for p in module.parameters()):
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
    yield from ddp.averaged_parameters(module)
    yield from module.parameters()


def _fsdp2_groups(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if is_fsdp2(child):
            yield from fsdp.groups_of(child)
