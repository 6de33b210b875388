"""Whether DDP or FSDP synchronises gradients: turning that off for a while, and noticing that it was off.

Which flags are set is the program's doing and so the same on every rank.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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


class Synchronisation:
    """The wrappers of some modules, found once."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._wrappers = wrappers(modules)
        self._groups = [g for m in self._wrappers if is_fsdp2(m) for g in _fsdp2_groups(m)]
        # One parameter that trains tells for its whole FSDP2 group.
        self._witnesses: list[Any] = [
            next((p for p in group.fsdp_params if p.sharded_param.requires_grad), None)
            for group in self._groups
        ]

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

    def was_off(self, tensors: Sequence[Tensor]) -> str | None:
        """``"DDP"``, ``"FSDP1"`` or ``"FSDP2"`` if its gradients may not be synchronised, else None.

        For FSDP this is certain. DDP only remembers its last forward pass, which may have been an
        evaluation: there the gradients themselves must be compared.

        Args:
            tensors: the parameters that FSDP1 manages. Without synchronisation it leaves the whole flat
                gradient on a shard; torch itself never has another shape there.
        """
        if any(
            isinstance(m, DistributedDataParallel) and not m.require_forward_param_sync
            for m in self._wrappers
        ):
            return "DDP"
        if any(p is not None and _holds_unsharded_gradient(p) for p in self._witnesses):
            return "FSDP2"
        if any(getattr(group, "_partial_reduce_output", None) is not None for group in self._groups):
            return "FSDP2"  # hybrid sharding, after set_requires_all_reduce(False)
        if any(t.grad is not None and t.grad.shape != t.shape for t in tensors):
            return "FSDP1"
        if any(is_fsdp1(m) and not m._sync_gradients for m in self._wrappers):
            return "FSDP1"  # NO_SHARD, whose gradients do not tell, still in no_sync()
        return None


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
    if parameter.unsharded_accumulated_grad is not None:
        return True
    unsharded = getattr(parameter, "_unsharded_param", None)
    return unsharded is not None and unsharded.grad is not None
