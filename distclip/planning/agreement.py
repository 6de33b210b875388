"""Are all ranks configured alike, and do they pass the same parameters?

The first message of every plan of more than one rank: a maximum over hashes and their negatives, of a size
that depends on nothing. What differs is then quoted from both sides, in the same error on every rank. So is
whatever one rank finds wrong on its own, which would otherwise leave the others waiting.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.decide.parameter_info import ParameterInfo
from distclip.errors import OwnershipError, SettingsError
from distclip.layout.placement import Placement
from distclip.layout.scope import Scope

_QUOTED = 16384  # bytes of a quotation that are compared, and
_SHOWN = 400  # characters of it that are shown
_FIELDS = ("strategy", "state", "options", "call", "stages")
_PER_STAGE = ("count", "names", "shapes")  # what ranks of one stage have in common


@dataclass(frozen=True)
class Listed:
    """What only all ranks together know of the list.

    Attributes:
        counts: parameters of each stage.                               # [num_stages]
        anywhere: what may be so on this rank: whether it is so on any.
    """

    counts: list[int]
    anywhere: list[bool]


def agree_on_settings(
    settings: Mapping[str, str],
    infos: Sequence[ParameterInfo],
    dtypes: Sequence[torch.dtype],
    placements: Sequence[Placement],
    places: Sequence[tuple[int, str]] | None,
    here: Sequence[bool],
    complaint: str | None,
    scope: Scope,
    device: torch.device,
) -> Listed:
    """One message of a few numbers; a second one, of a few for each stage, where there are stages.

    Args:
        settings: what is to be the same on every rank, in words; of the keys in ``_FIELDS``.
        places: of parameters that came without names, where they stand in their module, and what they are
        called. here: facts of this rank, for ``anywhere``.
        complaint: what this rank has found wrong already, or None.

    Raises:
        SettingsError, OwnershipError: on every rank alike.
    """
    group = scope.group()
    assert group is not None
    told = {**settings, "stages": f"{scope.num_stages} pipeline stage(s)"}
    words = [told.get(name, "") for name in _FIELDS]
    names, shapes = list(map(_name, infos, placements)), list(map(_shape, infos, dtypes, placements))
    order = "" if places is None else f"\n{[k for k, _ in places]}"
    lists = [str(len(infos)), "\n".join(names) + order, "\n".join(shapes)]
    # The lists of other stages differ: theirs are compared in the second message.
    hashes = [*map(_hash, words), *([0.0] * 3 if scope.stages else map(_hash, lists))]
    complains = -math.inf if complaint is None else -float(dist.get_rank())
    message = _maximum(
        [*hashes, *(-h for h in hashes), complains, len(infos), -len(infos), *here], group, device
    )
    n = len(hashes)
    high, low = message[:n], [-x for x in message[n : 2 * n]]
    complainer, most, least, *anywhere = message[2 * n :]
    if not math.isinf(complainer):
        rank = round(-complainer)
        said = quotations([complaint if dist.get_rank() == rank else None], group, device)[0]
        raise OwnershipError(f"rank {rank}: {said}")
    for i, name in enumerate(_FIELDS):
        if high[i] != low[i]:
            raise SettingsError(_disagreement(name, words[i], hashes[i], high[i], low[i], group, device))
    if scope.stages is not None:
        counts = _counts_of_stages(lists, scope, group, device)
    else:
        k = len(_FIELDS)
        if high[k:] != low[k:]:
            entries = [f"{name!r} of shape {shape}" for name, shape in zip(names, shapes, strict=True)]
            raise OwnershipError(_difference(entries, places, round(most), round(-least), group, device))
        counts = [len(infos)]
    return Listed(counts, list(map(bool, anywhere)))


def require_same_settings(
    settings: Mapping[str, str], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Of settings that are known to differ: say which.

    Raises:
        SettingsError: on every rank alike.
    """
    words = [settings.get(name, "") for name in _FIELDS]
    hashes = list(map(_hash, words))
    message = _maximum([*hashes, *(-h for h in hashes)], group, device)
    n = len(hashes)
    for i, name in enumerate(_FIELDS):
        high, low = message[i], -message[n + i]
        if high != low:
            raise SettingsError(_disagreement(name, words[i], hashes[i], high, low, group, device))


def hash_of_settings(settings: Mapping[str, str]) -> float:
    return _hash(repr([settings.get(name, "") for name in _FIELDS]))


def _disagreement(
    name: str, own: str, mine: float, high: float, low: float, group: dist.ProcessGroup, device: torch.device
) -> str:
    """Both sides, and on which ranks. All ranks call this."""
    sides = [own if mine == side else None for side in (high, low)]
    one, other = _from_difference(*quotations(sides, group, device))
    side = 1.0 if mine == high else 2.0 if mine == low else 3.0
    own_place = dist.get_rank(group)
    found = _maximum([side if i == own_place else 0.0 for i in range(group.size())], group, device)
    ranks = dist.get_process_group_ranks(group)
    first, second, more = ([r for r, f in zip(ranks, found, strict=True) if f == k] for k in (1, 2, 3))
    others = f" ({_ranks(more)}: something else again)" if more else ""
    return (
        f"ranks are configured differently: {_HEADLINES[name]} is\n  {one}\non {_ranks(first)}, and\n  "
        f"{other}\non {_ranks(second)}{others}. Give every rank the same."
    )


def _from_difference(one: str, other: str) -> tuple[str, str]:
    """Long ones from a little before where they differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    begin = 0 if max(len(one), len(other)) <= _SHOWN else max(0, same - _SHOWN // 4)
    cut = ("…" if begin else "") + "{}" + "{}"
    return tuple(  # type: ignore[return-value]
        cut.format(t[begin : begin + _SHOWN], "…" if len(t) > begin + _SHOWN else "") for t in (one, other)
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank(s) {shown}" + (f", … ({len(ranks)} ranks)" if ranks[8:] else "")


_HEADLINES = {
    "strategy": "the strategy",
    "state": "the state of the strategy (was a checkpoint loaded on some ranks only?)",
    "options": "what is passed beside it",
    "call": "what is asked of this step",
    "stages": "stages=",
}

REMEDIES = """\
Say what it is:
  (a) parameters managed by FSDP1: pass the FSDP module itself instead of its parameters;
  (b) shards or experts of its own on every rank: distclip.declare(parameter, sharded_over=group);
  (c) pipeline stages: pass stages=group;
  (d) other ranks train other models: pass process_group= with the ranks of this one."""

_ALL_OF_THEM = (
    "Pass all parameters on every rank, in one order (a missing gradient counts as zero, so do not filter by "
    "`p.grad is not None`)."
)


def _counts_of_stages(
    lists: Sequence[str], scope: Scope, group: dist.ProcessGroup, device: torch.device
) -> list[int]:
    columns = [float(lists[0]), *map(_hash, lists[1:])]
    message = [-math.inf] * (2 * len(columns) * scope.num_stages)
    for i, value in enumerate(columns):
        message[(2 * i) * scope.num_stages + scope.stage] = value
        message[(2 * i + 1) * scope.num_stages + scope.stage] = -value
    found = _maximum(message, group, device)
    rows = [found[i : i + scope.num_stages] for i in range(0, len(found), scope.num_stages)]
    for i, what in enumerate(_PER_STAGE):
        for stage, (high, low) in enumerate(zip(rows[2 * i], rows[2 * i + 1], strict=True)):
            if high != -low:
                figures = f": {-low:.0f} on some, {high:.0f} on others" if i == 0 else ""
                raise OwnershipError(
                    f"ranks of stage {stage} pass different parameters ({what}{figures}); {lists[0]} on rank "
                    f"{dist.get_rank()}. {_ALL_OF_THEM} {REMEDIES}"
                )
    return [round(c) for c in rows[0]]


def _difference(
    said: list[str],
    places: Sequence[tuple[int, str]] | None,
    most: int,
    least: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> str:
    """Where the lists of ranks differ first. All ranks call this."""
    told = said
    if places is not None:
        told = [f"{text} {k}" for text, (k, _) in zip(said, places, strict=True)]
        said = [f"{text} ({name})" for text, (_, name) in zip(said, places, strict=True)]
    hashes = list(map(_hash, told[:least]))
    found = _maximum([*hashes, *(-h for h in hashes)], group, device)
    differing = next((i for i in range(least) if found[i] != -found[least + i]), least)
    own = said[differing] if differing < len(said) else None
    mine = _hash(told[differing]) if own is not None else 0.0
    top = own if differing == least or mine == found[differing] else None
    bottom = own if differing < least and mine == -found[least + differing] else None
    one, other = quotations([top, bottom], group, device)
    counts = f"different numbers of parameters: {least} on some, {most} on others, {len(said)} on rank "
    if most == least:
        counts = "different parameters, or in another order; seen on rank "
    where = f"Number {differing} is {one} on some ranks, and " + (
        f"{other} on others." if other else "missing on others."
    )
    return f"ranks pass {counts}{dist.get_rank()}. {where} {_ALL_OF_THEM} {REMEDIES}"


def _name(info: ParameterInfo, placement: Placement) -> str:
    """Experts and shards that each rank has made by itself may be named and cut as it likes."""
    return "(a shard of this rank's own)" if _is_own(placement) else info.name


def _shape(info: ParameterInfo, dtype: torch.dtype, placement: Placement) -> str:
    """With the dtype: by float64 ranks decide how many numbers they send. And with how it is cut: what comes
    next asks along those axes."""
    own, cuts = _is_own(placement), len(placement.shards)
    cut = f", cut along {cuts} {'axis' if cuts == 1 else 'axes'}" if cuts and not own else ""
    return f"{'?' if own else tuple(info.shape)} ({str(dtype).removeprefix('torch.')}{cut})"


def _is_own(placement: Placement) -> bool:
    return placement.mesh is None and placement.home is None and bool(placement.shards)


def _maximum(values: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    message = torch.tensor(values, dtype=torch.float64, device="cpu").to(device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    found: list[float] = message.tolist()
    return found


def quotations(
    texts: Sequence[str | None], group: dist.ProcessGroup, device: torch.device, size: int = _QUOTED
) -> list[str]:
    """Each text from the ranks that have it (the same one on all of these), on every rank."""
    table = torch.zeros(len(texts), size, dtype=torch.uint8, device="cpu")
    for row, text in enumerate(texts):
        if text is not None:
            data = bytearray(text.encode()[:size])
            if data:
                table[row, : len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    rows: list[Tensor] = list(table.cpu())
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


def _hash(text: str) -> float:
    """48 bits, which float64 holds exactly; never 0."""
    return float(1 + int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))
