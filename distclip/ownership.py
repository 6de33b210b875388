"""Saying which rank holds what, where a plain tensor does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.layout import declarations
from distclip.layout.placement import Axis, Declaration

Group: TypeAlias = dist.ProcessGroup | DeviceMesh
"""A process group, or a 1-D mesh (``mesh["tp"]``)."""


def declare(
    module_or_parameter: nn.Module | Tensor,
    *,
    sharded_over: Group | Sequence[Group] | None = None,
    partial_over: Group | Sequence[Group] | None = None,
    tied_over: Group | None = None,
    local: bool = False,
) -> None:
    """Say how plain parameters lie over the ranks: manual tensor or expert parallelism, tied weights.

    Every rank that holds the parameters declares them alike; what is declared later counts from the next clip
    on, and replaces what was declared before. What can be checked is checked when the plan is made (copies
    must be equal); ``clipper.verify()`` checks the rest on real gradients.

    Args:
        module_or_parameter: a module, for all parameters in it: what is said then holds for their names, also
            after ``load_state_dict(assign=True)``, ``to_empty()`` or ``fully_shard`` have put others in
            their place. Or one parameter: that is said of this object alone, and clipping is an error once
            another has taken its place.
        sharded_over: group(s) along which every rank holds *different* elements: the parts of a matrix
            under tensor parallelism, or experts of its own. Along all other groups the ranks hold
            copies. ``()`` declares a plain replica.
        partial_over: group(s) along which the ranks hold copies, but each only its part of the gradient
            (a LayerNorm under Megatron's sequence parallelism). distclip sums these gradients in place,
            once, before it takes the norm, so leave that to it.
        tied_over: group whose ranks, on different pipeline stages, hold the same parameter (tied
            embeddings). Their gradients must have been summed over the group, as Megatron does; they then
            count once. Needs ``stages=``.
        local: no other rank holds any part of it: every rank trains a model of its own. Not to be mixed
            with other parameters in one call.

    Raises:
        ValueError: nothing is declared, ``local`` is joined with a group, ``partial_over`` is said of a
            DTensor (whose gradient's placement tells), or this rank is no member of a group.
        TypeError: an argument is of another type.

    Example:
        >>> distclip.declare(model.experts, sharded_over=expert_group)
        >>> distclip.declare(model.up.weight, sharded_over=mesh["tp"])
        >>> distclip.declare(model.norm, partial_over=mesh["tp"])
    """
    declaration = declaration_of(
        sharded_over=sharded_over, partial_over=partial_over, tied_over=tied_over, local=local
    )
    if isinstance(module_or_parameter, nn.Module):
        if declaration.partial:
            for parameter in module_or_parameter.parameters():
                _require_plain(parameter)
        declarations.add_to_module(module_or_parameter, declaration)
    elif isinstance(module_or_parameter, Tensor):
        if declaration.partial:
            _require_plain(module_or_parameter)
        declarations.add_to_parameter(module_or_parameter, declaration)
    else:
        raise TypeError(f"expected a Module or a parameter, got {type(module_or_parameter).__name__}")


def declaration_of(
    *,
    sharded_over: Group | Sequence[Group] | None = None,
    partial_over: Group | Sequence[Group] | None = None,
    tied_over: Group | None = None,
    local: bool = False,
) -> Declaration:
    """What :func:`declare` says with these arguments."""
    if sharded_over is None and partial_over is None and tied_over is None and not local:
        raise ValueError(
            "declare() was told nothing: pass sharded_over=, partial_over=, tied_over= or local=True"
        )
    if local and (sharded_over or partial_over or tied_over):
        raise ValueError(
            "local=True says that no other rank holds any part, so it joins with no sharded_over=, "
            "partial_over= or tied_over="
        )
    shards = _axes(sharded_over, "sharded_over")
    partial = _axes(partial_over, "partial_over")
    tied = None if tied_over is None else Axis.along(tied_over, "tied_over")
    words = [f"sharded over {axis.name}" for axis in shards] + [
        f"partial over {axis.name}" for axis in partial
    ]
    words += ["tied over " + tied.name] if tied else []
    label = "local" if local else ", ".join(words) or "replicated"
    return Declaration(f"declared {label}", shards, None, partial, tied, local)


def _require_plain(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(
            "partial_over= is for plain tensors; a DTensor's gradient says itself where it is partial"
        )


def _axes(given: Group | Sequence[Group] | None, argument: str) -> tuple[Axis, ...]:
    if given is None:
        return ()
    if isinstance(given, dist.ProcessGroup | DeviceMesh):
        return (Axis.along(given, argument),)
    if not isinstance(given, Sequence):
        raise TypeError(f"{argument}={given!r}: expected a ProcessGroup, a 1-D DeviceMesh, or several")
    return tuple(Axis.along(group, argument) for group in given)
