"""Do all ranks mean the same parameters, and are the copies really copies?

A plain tensor says nothing about other ranks, a DTensor nothing about ranks outside its mesh, and a
declaration may be wrong. So for each of them the ranks in scope compare a fingerprint: of the values, and
of the gradients where there are any (experts copied from one dense layer, or shards that start as zeros,
have equal values but unequal gradients; so have replicas whose gradients were never synchronised). Equal
wherever copies should be: good. Anything else is an :class:`OwnershipError` on every rank.

A few all-reduces per plan, of a few words per parameter; nothing is gathered. Gradients are compared again at
later steps, since those of the first may have been missing or not finite, and synchronisation may stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from distclip import kernels
from distclip.decide.parameter_info import ParameterInfo
from distclip.errors import OwnershipError
from distclip.layout.parameters import NamedParameter
from distclip.layout.placement import Placement, distinct
from distclip.layout.scope import Scope, first_message_device, message_device
from distclip.planning.agreement import agree_on_settings, quotations
from distclip.planning.arrival import meet
from distclip.planning.evidence import MOST_TIED, evidence_of
from distclip.planning.fault import explain, find_fault
from distclip.planning.rounding import Rounding

_NAME_BYTES = 120  # of a name that ranks of other stages are told: its end


@dataclass(frozen=True)
class Agreement:
    """What only all ranks together know.

    Attributes:
        every: the parameters of all stages, in order of stages; tied copies are one and have the name of the
            first. The shape of those in other stages is not known, and empty.
        rows: where this rank's own parameters stand among them.            # [num_parameters]
        copies: by parameter index, the number of stages that hold a tied copy, where more than one.
        partial: by parameter index, the DTensor gradients that have ``Partial`` placements on any rank,
            with the reduction per mesh axis (``""``, ``"sum"`` or ``"avg"``): a rank on which such a
            gradient is missing has to join its sum all the same.
        sharded: whether any parameter on any rank is sharded within its stage.
        accelerated: whether any rank has parameters on an accelerator, as far as that was asked.
        proven: whether all whose gradients are compared have been, with finite gradients on every rank.
        comparable: by parameter index, those whose gradients are compared between ranks; () where that is so
            on every rank, and None where some other rank has any.
    """

    every: tuple[ParameterInfo, ...]
    rows: tuple[int, ...]
    copies: dict[int, int] = field(default_factory=dict)
    partial: dict[int, tuple[str, ...]] = field(default_factory=dict)
    sharded: bool = False
    accelerated: bool = False
    comparable: tuple[int, ...] | None = ()
    proven: bool = True
    rounding: Rounding = field(default_factory=Rounding)


def agree(
    parameters: Sequence[NamedParameter],
    infos: Sequence[ParameterInfo],
    placements: Sequence[Placement],
    scope: Scope,
    settings: Mapping[str, str],
    places: Sequence[tuple[int, str]] | None = None,
    complaint: str | None = None,
    call: int = 0,
) -> Agreement:
    """Check on every rank together that the parameters mean the same thing everywhere, and the settings are
    one.

    One message of a fixed size; more where there is something to ask: several stages, a plain or declared
    parameter, a DTensor whose mesh does not cover the scope, or one that is replicated along some axis
    (whose gradient may be partial).

    Raises:
        SettingsError, OwnershipError: on every rank in scope alike.
    """
    names = [p.name for p in parameters]
    different = distinct(placements)
    sharded = any(p.shards for p in different)
    doubtful = {id(p) for p in different if p.home is None or len(p.home.ranks) < scope.stage_size}
    unproven = [i for i, p in enumerate(placements) if id(p) in doubtful]
    compared = tuple(i for i in unproven if _tells_by_gradient(placements[i]))
    replicated = any(t.is_replicate() for p in different for t in p.torch_placements)
    plain = Agreement(tuple(infos), tuple(range(len(infos))), sharded=sharded)
    if scope.size == 1:
        return plain

    group = scope.group()
    assert group is not None
    meet(group, names, call)
    tensors = [p.tensor for p in parameters]
    devices = {t.device for t in tensors}
    here = (
        sharded,
        not kernels.all_in_triton(devices),
        any(d.type != "cpu" for d in devices),
        bool(unproven or replicated or scope.stages),
        bool(compared),
    )
    dtypes, device = [t.dtype for t in tensors], first_message_device(group, tensors)
    listed = agree_on_settings(settings, infos, dtypes, placements, places, here, complaint, scope, device)
    counts, (sharded, lacking, accelerated, asks, compares) = listed.counts, listed.anywhere
    if lacking:
        kernels.forgo_triton(devices)
    comparable = (compared or None) if compares else ()
    device = message_device(group, tensors, accelerated=accelerated)
    offset, total = sum(counts[: scope.stage]), sum(counts)
    if total == 0 or not asks:
        return replace(plain, sharded=sharded, accelerated=accelerated, comparable=comparable)

    words = evidence_of(parameters, placements, unproven, scope, device)
    silent = words[:, -1].isnan().tolist()  # no finite gradient to show
    lacking_here = {i for i in compared if silent[i]}
    codes = [
        [_partial_code(p.tensor), info.optimizer_group, info.units, i in lacking_here]
        for i, (p, info) in enumerate(zip(parameters, infos, strict=True))
    ]
    extra = torch.tensor(codes, dtype=torch.float64, device="cpu").to(device).view(-1, 4)
    # Each stage fills its own rows. NaN, no evidence, loses against any.
    rows = slice(offset, offset + len(parameters))
    message = torch.full((2 * words.size(1) + 4, total), -math.inf, dtype=torch.float64, device=device)
    message[:, rows] = torch.cat([words, -words, extra], dim=1).T.nan_to_num(nan=-math.inf)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    high, low, extra = torch.split(message.T.cpu(), [words.size(1), words.size(1), 4], dim=1)
    code, group_of, units_of, lacks = extra.unbind(dim=1)

    if scope.stages is not None:
        ends = [name.encode()[-_NAME_BYTES:].decode(errors="ignore") for name in names]
        others = total - offset - len(ends)
        names = quotations([*[None] * offset, *ends, *[None] * others], group, device, _NAME_BYTES)
    spread = high + low
    if fault := find_fault(high, spread):
        raise OwnershipError(explain(*fault, names, offset, placements, scope))
    rounding = Rounding()
    rounding.say(spread[:, 3:], names, scope)
    first: dict[int, int] = {}  # by tie, the row of the first copy
    originals = [
        first.setdefault(tie, row) if tie > 0 else row for row, tie in enumerate(high[:, 2].long().tolist())
    ]
    kept = {row: k for k, row in enumerate(sorted(set(originals)))}
    copies = high[rows, 2].long() % MOST_TIED
    own = tuple(kept[originals[row]] for row in range(offset, offset + len(parameters)))
    every = [
        ParameterInfo(names[row], torch.Size(), group, units)
        for row, group, units in zip(
            kept, group_of[list(kept)].long().tolist(), units_of[list(kept)].long().tolist(), strict=True
        )
    ]
    for row, info in zip(own, infos, strict=True):
        every[row] = replace(info, name=every[row].name) if info.name != every[row].name else info
    return Agreement(
        tuple(every),
        own,
        {i: count for i, count in enumerate(copies.tolist()) if count > 1},
        {i: _decode(int(c)) for i, c in enumerate(code[rows].tolist()) if c > 0},
        sharded,
        accelerated,
        comparable,
        proven=not bool((lacks > 0).any()),
        rounding=rounding,
    )


def _tells_by_gradient(placement: Placement) -> bool:
    """Whether its gradients should be the same on all ranks that hold copies, as backward leaves them."""
    return placement.home is None and not placement.partial and not placement.shards


_REDUCTIONS = ("", "sum", "avg")


def _partial_code(parameter: Tensor) -> int:
    """One base-4 digit per mesh axis: 0 not partial, 1 a sum, 2 an average."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return 0
    return sum(
        _REDUCTIONS.index(p.reduce_op) * 4**i
        for i, p in enumerate(gradient.placements)
        if isinstance(p, Partial)
    )


def _decode(code: int) -> tuple[str, ...]:
    digits = []
    while code:
        code, digit = divmod(code, 4)
        digits.append(_REDUCTIONS[digit])
    return tuple(digits)
