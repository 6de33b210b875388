"""The collectives of a step. No other module that runs every step talks to other ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from distclip.decide.transfer import on_device
from distclip.layout.placement import SUMMED, Axis, Placement, resolve_group
from distclip.planning.news import AskedOtherwise, OutdatedPlan
from distclip.planning.plan import Plan
from distclip.torch_private.dtensor import local_of as local_of  # measure/overlap.py has it from here
from distclip.torch_private.groups import by_name


class News(NamedTuple):
    """What ranks tell each other beside the numbers of a step.

    Attributes:
        outdated: this rank's plan does not describe its parameters any more.
        word: for what this rank is asked, in (0, WORDS); 0 says nothing.
        looks: at what the others say, also where that waits for an accelerator.
    """

    outdated: bool = False
    word: int = 0
    looks: bool = False


WORDS = 2**17  # so that float64 holds the sum of their squares over 2^19 ranks


def reduce_message(
    message: Tensor, norm_type: float, group_name: str | None, *, news: News | None = None
) -> Tensor:
    """Every rank's contributions, float64 of any shape, joined: a sum, or for p = ∞ a maximum.

    ``news``: in a few numbers beside. A rank whose plan is out of date makes every norm NaN (or ∞), so that
    no other takes what is left for the whole.

    Raises:
        OutdatedPlan: on this rank, or on any where the news are read: on the CPU they always are.
        AskedOtherwise: likewise: ranks say different words.
    """
    largest = math.isinf(norm_type)
    if largest:
        # A maximum may lose a NaN on the way; an infinity is as good a witness.
        message.nan_to_num_(nan=math.inf, posinf=math.inf)
    if group_name is None:
        return message
    shape = message.shape
    if news is not None:
        if news.outdated:
            message = torch.full_like(message, math.inf if largest else math.nan)
        message = torch.cat([message.flatten(), _told(news, largest, message)])
    if torch.compiler.is_compiling():  # which knows groups by name only
        message = by_name.all_reduce(message, "max" if largest else "sum", group_name)  # type: ignore[arg-type]
    else:
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        dist.all_reduce(message, op=operation, group=resolve_group(group_name))
    if news is None:
        return message
    heard, message = message[-_TOLD:], message[:-_TOLD].view(shape)
    if not torch.compiler.is_compiling() and (
        heard.is_cpu or news.outdated or (news.looks and type(heard) is Tensor)
    ):
        ranks_outdated, ranks_current, speakers, *words = heard.tolist()
        if ranks_outdated:
            raise OutdatedPlan(everyone=not ranks_current)
        if speakers and _differ(speakers, *words, largest=largest):
            raise AskedOtherwise
    return message


_TOLD = 5  # numbers: outdated, current, whether it says a word, and two by which it is seen whether all agree


def _told(news: News, largest: bool, like: Tensor) -> Tensor:
    """[_TOLD]."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        silent = like.new_full((), -math.inf if largest else 0.0)
        return torch.stack([like.new_zeros(()), like.new_ones(()), like.new_zeros(()), silent, silent])
    return _kept(news.outdated, news.word, largest, like.device)


@lru_cache(maxsize=64)
def _kept(outdated: bool, word: int, largest: bool, device: torch.device) -> Tensor:
    if largest:
        seen: list[float] = [word, -word] if word else [-math.inf] * 2
    else:
        seen = [word, word**2]
    with torch.inference_mode(False):
        return on_device([outdated, not outdated, bool(word), *seen], torch.float64, device)


def _differ(speakers: float, first: float, second: float, *, largest: bool) -> bool:
    """Whether not all who speak say the same word: by its largest and its least, or by its sum and that of
    its square, in whole numbers."""
    return first != -second if largest else int(speakers) * int(second) != int(first) ** 2


def settle_gradients(plan: Plan, parameters: Sequence[Tensor]) -> None:
    """Bring DTensor gradients that lie otherwise than their parameters into the parameters' placement.

    ``Partial`` gradients of replicated parameters (sequence parallelism), and those of plain parameters
    declared ``partial_over=``, are summed, all of one axis and dtype in a single all-reduce, and written
    back as replicated. A rank whose gradient is missing joins with zeros and receives the sum. (Invariant:
    the ranks of a mesh that have a gradient have it in the same placement, as DTensor's backward pass
    leaves it.)
    """
    flights: dict[tuple[str, str, torch.dtype], list[_PartialGradient]] = {}
    for i, (parameter, placement) in enumerate(zip(parameters, plan.placements, strict=True)):
        axes = _pending(parameter, placement, plan.partial.get(i, ()))
        if axes:
            partial = _PartialGradient.of(parameter, placement)
            for axis, reduction in axes:
                flights.setdefault((axis.group_name, reduction, partial.local.dtype), []).append(partial)
    for (group_name, reduction, _), members in flights.items():
        _sum(members, resolve_group(group_name), reduction)
    for partial in {id(p): p for members in flights.values() for p in members}.values():
        partial.write_back()


def is_summed(parameter: Tensor) -> bool:
    """Whether the present gradient of a parameter declared ``partial_over=`` has been summed already.

    The mark is the gradient itself, and backward takes it away (see ``distclip.declare``): a gradient that
    is only changed in place afterwards, say unscaled, is not summed twice.
    """
    return parameter.grad is not None and getattr(parameter, SUMMED, None) is parameter.grad


def _pending(parameter: Tensor, placement: Placement, agreed: tuple[str, ...]) -> list[tuple[Axis, str]]:
    """The sums that the gradient still needs: over which axis, and whether ``"sum"`` or ``"avg"``."""
    if placement.partial:
        return [] if is_summed(parameter) else [(axis, "sum") for axis in placement.partial]
    gradient, mesh = parameter.grad, placement.mesh
    reductions: tuple[str, ...] = ()
    if gradient is None:
        reductions = agreed
    elif isinstance(gradient, DTensor) and gradient.placements != placement.torch_placements:
        reductions = _pending_reductions(gradient.placements, placement.torch_placements)
        if not reductions:
            parameter.grad = gradient.redistribute(mesh, placement.torch_placements)
    if mesh is None:
        return []
    return [(Axis.of_mesh(mesh, i), reduction) for i, reduction in enumerate(reductions) if reduction]


def _pending_reductions(found: Sequence[Any], wanted: Sequence[Any]) -> tuple[str, ...]:
    """The reduction per axis that turns ``found`` into ``wanted``; () where it takes more than a sum."""
    if all(f == w or (f.is_partial() and w.is_replicate()) for f, w in zip(found, wanted, strict=True)):
        return tuple(f.reduce_op if f.is_partial() else "" for f in found)
    return ()


@dataclass(eq=False)
class _PartialGradient:
    parameter: Tensor
    placement: Placement
    local: Tensor
    holders: Tensor  # [1]: of the ranks summed so far, how many had a gradient

    @staticmethod
    def of(parameter: Tensor, placement: Placement) -> _PartialGradient:
        gradient = parameter.grad
        local = torch.zeros_like(local_of(parameter)) if gradient is None else wait(local_of(gradient))
        return _PartialGradient(parameter, placement, local, local.new_full((1,), gradient is not None))

    def write_back(self) -> None:
        parameter, gradient = self.parameter, self.parameter.grad
        if isinstance(parameter, DTensor):
            # Only a rank that had none has to look whether any other had (the one sync of this path).
            if gradient is not None or self.holders.item():
                parameter.grad = as_dtensor(self.local, parameter, self.placement.torch_placements)
            return
        if gradient is not None:
            gradient.copy_(self.local)  # it may be a view into a buffer of DDP
        elif self.holders.item():
            parameter.grad = self.local.clone()
        setattr(parameter, SUMMED, parameter.grad)


def _sum(members: Sequence[_PartialGradient], group: dist.ProcessGroup, reduction: str) -> None:
    flat = torch.cat([t.flatten() for m in members for t in (m.local, m.holders)])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
    if reduction == "avg":
        flat.div_(group.size())
    parts = iter(torch.split(flat, [n for m in members for n in (m.local.numel(), 1)]))
    for member in members:
        member.local = next(parts).view(member.local.shape)
        member.holders = next(parts)


def summed(gradient: Tensor) -> Tensor:
    """A gradient with what is ``Partial`` in it summed: one all-reduce for each such axis."""
    if not isinstance(gradient, DTensor) or not any(p.is_partial() for p in gradient.placements):
        return gradient
    return gradient.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in gradient.placements]
    )


def plain(value: Tensor | float) -> Tensor | float:
    """A number that may be a DTensor, as this rank can read it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_offloaded(tensor: Tensor) -> bool:
    """Whether it lies in the CPU's memory, and its mesh does not."""
    return isinstance(tensor, DTensor) and local_of(tensor).is_cpu and tensor.device_mesh.device_type != "cpu"


def as_dtensor(local: Tensor, like: Tensor, placements: Sequence[Any]) -> DTensor:
    """``local`` as this rank's piece of a DTensor of the shape of ``like``."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def wait(local: Tensor) -> Tensor:
    """``local``, after the collective that may still be filling it."""
    return local.wait() if hasattr(local, "wait") else local


def local_loss(loss: Tensor | None, *, optional: bool) -> Tensor | None:
    """[] as this rank has it.

    Raises:
        ValueError: there is none, or it is not one number.
    """
    if loss is None:
        if optional:
            return None
        raise ValueError("the strategy judges the loss: give it, clipper.step(optimizer, loss=loss)")
    loss = loss.detach()
    if isinstance(loss, DTensor):
        loss = loss.full_tensor()
    if loss.numel() != 1:
        raise ValueError(f"loss has shape {tuple(loss.shape)}: expected one number")
    return loss.reshape(())
