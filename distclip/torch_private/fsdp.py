"""What FSDP1 and FSDP2 know of the parameters they manage. In 2.6 already, but where it says otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# FSDP1: the parameters of each instance are one flat one, in the hands of a handle.


class Flat:
    """The flat parameter of an FSDP1 instance, with the originals that it is made of.

    Attributes:
        tensor: the flat parameter, of which this rank may hold a part.
        whole: the shape of all of it, without what fills it up to a multiple of the ranks.
        shapes: of the originals, in order.
        sharded: whether ranks hold different parts of it.
        keeps_originals: whether the originals are parameters of the module (``use_orig_params=True``).
        originals: these, else ().
    """

    def __init__(self, handle: Any) -> None:
        flat = handle.flat_param
        self.tensor: Tensor = flat
        self.whole = tuple(flat._unpadded_unsharded_size)
        self.shapes: list[tuple[int, ...]] = [tuple(shape) for shape in flat._shapes]
        self.sharded = bool(handle.uses_sharded_strategy)
        self.keeps_originals = bool(handle._use_orig_params)
        self.originals: Sequence[Tensor] = (flat._params or ()) if self.keeps_originals else ()

    def places(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Of each original that is kept: the module that holds it, its name there, and itself; shared ones in
        every place."""
        flat: Any = self.tensor
        if self.keeps_originals:
            for (name, holder, _), parameter in zip(flat._param_infos, self.originals, strict=True):
                yield holder, name, parameter
            for info, parameter in zip(flat._shared_param_infos, flat._shared_params or (), strict=True):
                yield info[1], info[0], parameter

    def shard(self, i: int) -> tuple[int, int, int] | None:
        """Of what is sharded, what this rank holds of the i-th original: where it lies in ``tensor``, how
        many elements, and from which of the original on; None for nothing."""
        flat: Any = self.tensor
        info = flat._shard_param_infos[i]
        if not info.in_shard:
            return None
        return info.offset_in_shard, info.numel_in_shard, info.intra_param_start_idx

    def begin(self, i: int) -> int:
        """Of what is not sharded, where in ``tensor`` the i-th original begins."""
        flat: Any = self.tensor
        return int(sum(flat._numels_with_padding[:i]))


def flat_of(instance: Any) -> Flat | None:
    """Of an FSDP1 module; None where it manages no parameter."""
    return None if instance._handle is None else Flat(instance._handle)


def flat_gradients(instance: Any) -> list[Tensor | None]:
    """Of an FSDP1 module and those inside it, as they lie now: sharded, or whole where it was not
    synchronised."""
    handles = [inner._handle for inner in instance.fsdp_modules(instance)]
    return [h.flat_param.grad for h in handles if h is not None and h.flat_param is not None]


def between_nodes(instance: Any) -> dist.ProcessGroup | None:
    """With hybrid sharding, the group of the ranks that hold copies of this one's shard; else None."""
    group: dist.ProcessGroup | None = getattr(instance, "_inter_node_pg", None)
    return group


def synchronises(instance: Any) -> bool:
    """Whether an FSDP1 module is in no ``no_sync()``."""
    return bool(instance._sync_gradients)


def flat_size(tensor: Tensor) -> torch.Size | None:
    """Of a flat parameter, the shape of all of it; None of any other tensor."""
    size: torch.Size | None = getattr(tensor, "_unpadded_unsharded_size", None)
    return size


# FSDP2: each module has groups of parameters, and of each parameter an object (here: a member) that knows it
# sharded and not.


def modules_with_state() -> list[nn.Module]:
    """Every living module that ``fully_shard`` (or another of torch's composable functions) was called on.
    In 2.6 already."""
    from torch.distributed._composable_state import _module_state_mapping

    return list(_module_state_mapping)


def groups_of(module: Any) -> list[Any]:
    """The parameter groups of one FSDP2 module, not of those inside it. Since 2.13 it may have several,
    before that one or none."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def members_of(group: Any) -> list[Any]:
    """The members of a parameter group."""
    found: list[Any] = group.fsdp_params
    return found


def sharded_parameter(member: Any) -> nn.Parameter:
    """The DTensor that the user's module has."""
    found: nn.Parameter = member.sharded_param
    return found


def unsharded_gradients(member: Any) -> list[Tensor | None]:
    """What this rank has accumulated of a whole gradient, without synchronisation: in the parameter's dtype,
    and in that of the reduction. (Since 2.15 there is one of them only.)"""
    unsharded = getattr(member, "_unsharded_param", None)  # there is none before the first forward pass
    own, accumulated = None if unsharded is None else unsharded.grad, member.unsharded_accumulated_grad
    return [own, None if accumulated is own else accumulated]


def holds_unsharded_gradient(member: Any) -> bool:
    """Whether there is any such."""
    if member.unsharded_accumulated_grad is not None:
        return True
    unsharded = getattr(member, "_unsharded_param", None)
    return unsharded is not None and unsharded.grad is not None


def awaits_finalization(module: Any) -> bool:
    """Whether a backward pass of the FSDP2 module waits for ``finalize_backward()``, or for ``wait()`` of the
    handle that this returned: since 2.15, after ``set_manual_backward_finalization(True)``; before, no."""
    context = getattr(module._get_fsdp_state(), "_state_ctx", None)
    active = getattr(context, "manual_backward_finalization_active", None)
    return bool(active or getattr(context, "gradient_reduction_pending", False))


def is_partly_reduced(group: Any) -> bool:
    """With hybrid sharding, whether gradients have been summed over the shards and not over the copies
    (``set_requires_all_reduce(False)``); where it does not say, not."""
    return getattr(group, "_partial_reduce_output", None) is not None
