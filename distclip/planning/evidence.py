"""The evidence that ranks compare: what each parameter is said to be, and fingerprints of what it holds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.layout.memory import is_bare
from distclip.layout.parameters import NamedParameter
from distclip.layout.placement import Axis, Placement, whole_shape
from distclip.layout.scope import Scope
from distclip.planning.fingerprint import TOLERANCE, WORDS, fingerprints
from distclip.torch_private.dtensor import local_of

# The columns of the table, and how far ranks may be apart in them.
COLUMNS = (
    ("name", slice(0, 1), 0.5),
    ("shape, dtype or placement", slice(1, 2), 0.5),
    ("tied_over= declaration", slice(2, 3), 0.5),
    ("value", slice(3, 3 + WORDS), TOLERANCE),
    ("gradient", slice(3 + WORDS, 3 + 2 * WORDS), TOLERANCE),
)
MOST_TIED = 1024  # stages that one parameter can be tied over


def evidence_of(
    parameters: Sequence[NamedParameter],
    placements: Sequence[Placement],
    indices: Sequence[int],
    scope: Scope,
    device: torch.device,
) -> Tensor:
    """[n, 3 + 2 * WORDS] float64, of whole tensors; NaN where there is no evidence. ``indices``: of those
    whose values and gradients are compared. One all-reduce for each axis that these are sharded over."""
    tensors = [p.tensor for p in parameters]
    values = _prints({i: tensors[i] for i in indices}, len(tensors), device)
    gradients = gradient_prints(tensors, placements, indices, device)
    words = torch.cat([_facts(parameters, placements, scope, device), values, gradients], dim=1)
    _join_shards(words, placements, indices)
    return words


def gradient_prints(
    tensors: Sequence[Tensor], placements: Sequence[Placement], indices: Sequence[int], device: torch.device
) -> Tensor:
    """[n, WORDS] float64, of this rank's piece of the gradients; NaN where there is no evidence."""
    return _prints({i: _settled_gradient(tensors[i], placements[i]) for i in indices}, len(tensors), device)


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
            tie = _hash(f"{stages} {ordinal}") * MOST_TIED + len(stages)
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


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())  # short, so that sums of them stay exact


def _settled_gradient(parameter: Tensor, placement: Placement) -> Tensor | None:
    """The gradient where it lies as the parameter does (a partial one may well differ)."""
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided or placement.partial:
        return None
    if isinstance(gradient, DTensor) and tuple(gradient.placements) != placement.torch_placements:
        return None
    return gradient


def _prints(tensors: Mapping[int, Tensor | None], count: int, device: torch.device) -> Tensor:
    """[count, WORDS] float64, in the rows of those that there are."""
    prints = torch.full((count, WORDS), math.nan, dtype=torch.float64, device=device)
    rows, shown = [], []
    for i, tensor in tensors.items():
        if tensor is not None and is_bare(local_of(tensor)):
            rows.append(i)
            shown.append(tensor)
    if rows:
        found = fingerprints(shown, device)
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
