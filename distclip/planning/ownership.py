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

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from distclip import kernels
from distclip.decide.parameter_info import ParameterInfo
from distclip.errors import OwnershipError
from distclip.layout.memory import is_bare
from distclip.layout.parameters import NamedParameter
from distclip.layout.placement import Axis, Placement, distinct, whole_shape
from distclip.layout.scope import Scope, first_message_device, message_device
from distclip.planning.agreement import REMEDIES, agree_on_settings, hash_of_settings, require_same_settings
from distclip.planning.arrival import meet
from distclip.planning.fingerprint import EXACT, TOLERANCE, WORDS, fingerprints

logger = logging.getLogger("distclip")

# The columns of what is compared, and how far ranks may be apart in them.
_COLUMNS = (
    ("name", slice(0, 1), 0.5),
    ("shape, dtype or placement", slice(1, 2), 0.5),
    ("tied_over= declaration", slice(2, 3), 0.5),
    ("value", slice(3, 3 + WORDS), TOLERANCE),
    ("gradient", slice(3 + WORDS, 3 + 2 * WORDS), TOLERANCE),
)
_NAME_BYTES = 120
_MOST_TIED = 1024  # stages that one parameter can be tied over


@dataclass
class Rounding:
    """How far apart the copies of one plan have been said to be in the log, relatively."""

    said: float = 0.0


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
    names = tuple(p.name for p in parameters)
    different = distinct(placements)
    sharded = any(p.shards for p in different)
    doubtful = {id(p) for p in different if p.home is None or len(p.home.ranks) < scope.stage_size}
    unproven = [i for i, p in enumerate(placements) if id(p) in doubtful]
    replicated = any(t.is_replicate() for p in different for t in p.torch_placements)
    if scope.size == 1:
        return Agreement(tuple(infos), tuple(range(len(infos))), sharded=sharded)

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
        any(_tells_by_gradient(placements[i]) for i in unproven),
    )
    dtypes, device = [t.dtype for t in tensors], first_message_device(group, tensors)
    listed = agree_on_settings(settings, infos, dtypes, placements, places, here, complaint, scope, device)
    counts, (sharded, lacking, accelerated, asks, compares) = listed.counts, listed.anywhere
    if lacking:
        kernels.forgo_triton(devices)
    compared = tuple(i for i in unproven if _tells_by_gradient(placements[i]))
    comparable = (compared or None) if compares else ()
    compared_here = set(compared)
    device = message_device(group, tensors, accelerated=accelerated)
    offset, total = sum(counts[: scope.stage]), sum(counts)
    if total == 0 or not asks:
        return Agreement(
            tuple(infos),
            tuple(range(len(infos))),
            sharded=sharded,
            accelerated=accelerated,
            comparable=comparable,
        )

    words = torch.cat(
        [
            _facts(parameters, placements, scope, device),
            _fingerprints(parameters, placements, unproven, lambda p, _: p, device),
            _fingerprints(parameters, placements, unproven, _settled_gradient, device),
        ],
        dim=1,
    )
    _join_shards(words, placements, unproven)
    silent = words[:, -1].isnan().tolist()  # no finite gradient to show
    lacks_here = [float(i in compared_here and silent[i]) for i in range(len(parameters))]
    codes = [
        [_partial_code(p.tensor), info.optimizer_group, info.units, lacks]
        for p, info, lacks in zip(parameters, infos, lacks_here, strict=True)
    ]
    extra = torch.tensor(codes, dtype=torch.float64, device="cpu").to(device).view(-1, 4)
    # Each stage fills its own rows. NaN, no evidence, loses against any.
    rows = slice(offset, offset + len(parameters))
    message = torch.full((2 * words.size(1) + 4, total), -math.inf, dtype=torch.float64, device=device)
    message[:, rows] = torch.cat([words, -words, extra], dim=1).T.nan_to_num(nan=-math.inf)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    high, low, extra = torch.split(message.T.cpu(), [words.size(1), words.size(1), 4], dim=1)
    code, group_of, units_of, lacks = extra.unbind(dim=1)

    rounding = Rounding()
    fault = _first_fault(high, high + low) or _tie_fault(high)
    if fault is None:

        def name_of(row: int) -> str:
            own = offset <= row < offset + len(parameters)
            return repr(parameters[row - offset].name) if own else "one of another stage"

        _say_how_far_apart((high + low)[:, 3:], name_of, scope, rounding)
    names = names if scope.stages is None else _all_names(names, offset, total, group, device)
    if fault is not None:
        what, differing = fault
        raise OwnershipError(_explain(what, differing, names, offset, placements, scope))
    first: dict[int, int] = {}  # by tie, the row of the first copy
    originals = [
        first.setdefault(tie, row) if tie > 0 else row for row, tie in enumerate(high[:, 2].long().tolist())
    ]
    kept = {row: k for k, row in enumerate(sorted(set(originals)))}
    copies = high[rows, 2].long() % _MOST_TIED
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


def _say_how_far_apart(
    spread: Tensor, name_of: Callable[[int], str], scope: Scope, rounding: Rounding
) -> None:
    """One log line where copies differ by rounding, and one more where that has grown tenfold: training goes
    on, but somebody should look."""
    apart = spread.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if not apart.numel() or dist.get_rank() != scope.ranks[0]:
        return
    if (most := float(apart.amax())) > max(EXACT, 9.9 * rounding.said):
        rounding.said = most
        row = int(apart.amax(dim=1).argmax())
        logger.warning(
            "copies of parameter %s on different ranks are not equal to the last bit: they, or their "
            "gradients, differ by about %.1g (relative). So little is taken for rounding. If it grows, look "
            "for what ranks compute in another order, and for gradients that nobody synchronises.",
            name_of(row), float(apart[row].amax()),
        )  # fmt: skip


class OutdatedPlan(Exception):
    """Some ranks have said, in a message of the step, that their parameters have changed.

    Attributes:
        everyone: all have, so that they can plan anew together.
    """

    def __init__(self, *, everyone: bool) -> None:
        super().__init__("the plan is out of date")
        self.everyone = everyone


class AskedOtherwise(Exception):
    """Ranks have said, in the message of the step, that they were asked for different things."""


def require_equal_gradients(
    names: Sequence[str],
    tensors: Sequence[Tensor] | None,
    placements: Sequence[Placement],
    compared: Sequence[int],
    rows: Sequence[int],
    scope: Scope,
    device: torch.device,
    settings: Mapping[str, str] | None,
    rounding: Rounding,
) -> None:
    """Compare the gradients of plain copies between ranks, as they are now, and the settings. One all-reduce.

    ``names``: of the parameters of all stages; ``rows``: where these stand among them;
    ``compared``: by parameter index; ``device``: the plan's; ``tensors``, ``settings``: None tells the others
    that this rank's parameters have changed.

    Raises:
        OwnershipError, SettingsError, OutdatedPlan: on every rank in scope alike.
    """
    group = scope.group()
    if group is None:
        return
    message = torch.full((2 * WORDS, len(names) + 1), -math.inf, dtype=torch.float64, device=device)
    if tensors is not None:
        parameters = [NamedParameter(names[row], t) for row, t in zip(rows, tensors, strict=True)]
        prints = _fingerprints(parameters, placements, compared, _settled_gradient, device)
        message[:, list(rows)] = torch.cat([prints, -prints], dim=1).T.nan_to_num(nan=-math.inf)
    if settings is not None:
        configured = hash_of_settings(settings)
        message[:WORDS, -1], message[WORDS:, -1] = configured, -configured
    else:
        message[:WORDS, -1] = math.inf  # which is no settings' hash
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    message = message.cpu()
    if message[0, -1] == math.inf:
        raise OutdatedPlan(everyone=bool(message[WORDS, -1] == -math.inf))
    spread = message[:WORDS] + message[WORDS:]
    if spread[0, -1] > 0:
        require_same_settings(settings or {}, group, device)
    spread = spread[:, :-1]
    differing = (spread > TOLERANCE).any(dim=0).nonzero().flatten().tolist()
    if differing:
        more = f" ({len(differing)} parameters are affected)" if len(differing) > 1 else ""
        raise OwnershipError(
            f"the gradient of parameter {names[differing[0]]!r} differs between ranks that should hold "
            f"copies of it{more}. If these are replicas, it has not been synchronised: synchronise in the "
            "last micro-batch (clipper.accumulate does), after no_sync() and "
            f"set_requires_gradient_sync(False), then clip. Otherwise they are no replicas. {REMEDIES}"
        )
    _say_how_far_apart(spread.T, lambda row: repr(names[row]), scope, rounding)


def _facts(
    parameters: Sequence[NamedParameter], placements: Sequence[Placement], scope: Scope, device: torch.device
) -> Tensor:
    """[n, 3] float64: what must be equal to the letter, hashed."""
    facts: list[list[int]] = []
    seen: dict[tuple[int, ...], int] = {}
    for p, placement in zip(parameters, placements, strict=True):
        tie = 0
        if placement.tied is not None and scope.stages is not None:
            stages = _stages_of(placement.tied, scope.stages)
            ordinal = seen[stages] = seen.get(stages, -1) + 1
            # Ranks of other replicas of the same pipeline come to the same word.
            tie = _hash(f"{stages} {ordinal}") * _MOST_TIED + len(stages)
        layout = f"{whole_shape(p.tensor)} {p.tensor.dtype} {len(placement.shards)}"
        facts.append([_hash(p.name), _hash(layout), tie])
    return torch.tensor(facts, dtype=torch.float64, device=device).view(-1, 3)


def _stages_of(tied: Axis, stages: Axis) -> tuple[int, ...]:
    pipeline = stages.ranks
    if outside := set(tied.ranks) - set(pipeline):
        raise ValueError(
            f"tied_over={tied.name} reaches rank(s) {sorted(outside)} outside this rank's pipeline "
            f"{list(pipeline)}: tie over ranks of one pipeline"
        )
    return tuple(sorted(pipeline.index(rank) for rank in tied.ranks))


def _first_fault(high: Tensor, spread: Tensor) -> tuple[str, list[int]] | None:
    for what, columns, tolerance in _COLUMNS:
        differing = (spread[:, columns] > tolerance).any(dim=1).nonzero().flatten().tolist()
        if differing:
            return what, differing
    return None


def _tie_fault(high: Tensor) -> tuple[str, list[int]] | None:
    """Tied copies, each in the rows of its own stage: are all there, and equal?"""
    by_tie: dict[int, list[int]] = {}
    for row, tie in enumerate(high[:, 2].tolist()):
        if tie > 0:
            by_tie.setdefault(int(tie), []).append(row)
    for tie, rows in by_tie.items():
        if len(rows) != tie % _MOST_TIED:
            return "tied_over= declaration", rows
        for what, columns, tolerance in _COLUMNS[3:]:
            copies = high[rows, columns]
            if copies.isfinite().all() and ((copies.amax(0) - copies.amin(0)) > tolerance).any():
                return f"tied {what}", rows
    return None


def _all_names(
    names: Sequence[str], offset: int, total: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[str, ...]:
    """The names of the parameters of all stages, as bytes of a fixed length (the end of longer ones)."""
    table = torch.zeros(total, _NAME_BYTES, dtype=torch.uint8, device="cpu")
    for row, name in enumerate(names, start=offset):
        text = name.encode()[-_NAME_BYTES:]
        table[row, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return tuple(bytes(row).rstrip(b"\0").decode(errors="replace") for row in table.cpu().tolist())


def _explain(
    what: str,
    differing: Sequence[int],
    names: Sequence[str],
    offset: int,
    placements: Sequence[Placement],
    scope: Scope,
) -> str:
    own = next((row for row in differing if offset <= row < offset + len(placements)), None)
    row = differing[0] if own is None else own
    name = names[row] if scope.stages else names[row - offset]
    label = "held by another stage" if own is None else placements[row - offset].label
    shown = f"parameter {name!r} ({label}; seen on rank {dist.get_rank()})"
    others = f" {len(differing)} parameters are affected." if len(differing) > 1 else ""
    if what == "tied_over= declaration":
        return (
            f"{shown} is not declared alike by all that hold it: each of the tied stages declares "
            f"tied_over= with the same ranks, and its tied parameters in the same order.{others}"
        )
    if what.startswith("tied"):
        return (
            f"the {what.removeprefix('tied ')} of {shown} differs between the stages that it is tied over."
            f"{others} Tied copies start equal, and their gradients are summed over the group before they "
            "are clipped."
        )
    if what == "gradient":
        return (
            f"the gradient of {shown} differs between ranks that should hold copies of it, though its value "
            f"is the same.{others} If these are replicas, their gradients have not been synchronised: clip "
            "outside no_sync(), after the last micro-batch, and wrap the model in DDP or FSDP (or declare "
            f"partial_over= and leave the sum to distclip). Otherwise they are no replicas. {REMEDIES}"
        )
    return (
        f"the {what} of {shown} differs between ranks that should hold copies of it ({scope.size} ranks are "
        f"in scope).{others} {REMEDIES}"
    )


def _settled_gradient(parameter: Tensor, placement: Placement) -> Tensor | None:
    """The gradient where it lies as the parameter does (a partial one may well differ)."""
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided or placement.partial:
        return None
    if isinstance(gradient, DTensor) and tuple(gradient.placements) != placement.torch_placements:
        return None
    return gradient


def _fingerprints(
    parameters: Sequence[NamedParameter],
    placements: Sequence[Placement],
    indices: Sequence[int],
    tensor_of: Callable[[Tensor, Placement], Tensor | None],
    device: torch.device,
) -> Tensor:
    """[n, WORDS] float64, of this rank's piece; NaN where there is no evidence."""
    prints = torch.full((len(parameters), WORDS), math.nan, dtype=torch.float64, device=device)
    rows, tensors = [], []
    for i in indices:
        tensor = tensor_of(parameters[i].tensor, placements[i])
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if tensor is not None and local is not None and is_bare(local):
            rows.append(i)
            tensors.append(tensor)
    if rows:
        found = fingerprints(tensors, device)
        # What is 10^-6 of the largest is rounding noise, and noise is no copy of noise.
        noise = found[:, -1] < found[:, -1].nan_to_num(nan=-math.inf).amax() - 20
        found[noise] = math.nan
        prints[rows] = found
    return prints


def _join_shards(words: Tensor, placements: Sequence[Placement], indices: Sequence[int]) -> None:
    """From the words of each rank's piece to words of the whole tensor, in place.

    A piece counts by its coordinate, so that shards in another order are another tensor. Ranks walk the
    axes in the same order: that of first appearance in a list that they share.
    """
    axes: dict[str, tuple[Axis, list[int]]] = {}
    for i in indices:
        for axis in placements[i].shards:
            axes.setdefault(axis.group_name, (axis, []))[1].append(i)
    for axis, members in axes.values():
        weights = [1 + c % 61 for c in range(axis.size)]  # small, so that sums of hashes stay exact
        piece = words[members] * weights[axis.coordinate]
        dist.all_reduce(piece, group=axis.group)
        piece[:, 3:] /= math.hypot(*weights)  # unit prints stay of order one
        piece[:, 2] = words[members, 2]  # a tie is the same on every rank of its stage
        words[members] = piece


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


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
