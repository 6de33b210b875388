"""Do all ranks mean the same parameters, and are the undeclared ones really replicas?

A plain tensor says nothing about other ranks, and a DTensor nothing about ranks outside its mesh. So
for each of them the ranks in scope compare a fingerprint: of the values, and of the gradients where
there are any (experts copied from one dense layer, or shards that start as zeros, have equal values
but unequal gradients; so have replicas whose gradients were never synchronised). Equal on all ranks:
replicas. Anything else is an :class:`OwnershipError` on every rank.

Two all-reduces per plan, the second of a few words per parameter; nothing is gathered.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from distclip._parameters import NamedParameter
from distclip._placement import Axis, Placement
from distclip._scope import Scope, message_device
from distclip.errors import OwnershipError

_SAMPLES = 256  # elements of a tensor that enter its fingerprint, evenly spaced
_PROJECTIONS = 4
_WORDS = _PROJECTIONS + 1  # and the logarithm of the norm

# Copies may have drifted by rounding (kernels with atomics, bf16), while tensors that are really
# different agree in all four unit projections to 1 % by chance once in 10^8.
_TOLERANCE = 1e-2

_ZERO_LOG2 = -1100.0  # stands for log2(0); below log2 of the smallest float64

_REMEDIES = """\
Say what it is:
  (a) parameters managed by FSDP1: pass the FSDP module itself instead of its parameters;
  (b) shards or experts of its own on every rank: distclip.declare(parameter, sharded_over=group);
  (c) pipeline stages: pass stages=group;
  (d) other ranks train other models: pass process_group= with the ranks of this one."""


def agree(
    parameters: Sequence[NamedParameter], placements: Sequence[Placement], scope: Scope
) -> dict[int, tuple[str, ...]]:
    """Check on every rank together that the parameters mean the same thing everywhere.

    Returns, by parameter index, those whose gradients are DTensors with ``Partial`` placements on any
    rank, each with the reduction per mesh axis (``""``, ``"sum"`` or ``"avg"``): a rank on which such
    a gradient is missing has to join its sum all the same.

    Communicates only where there is something to ask: no parameter at all here, a plain one, a DTensor
    whose mesh does not cover the scope, or one that is replicated along some axis (whose gradient may
    be partial).

    Raises:
        OwnershipError: on every rank in scope alike.
    """
    unproven = [i for i, p in enumerate(placements) if p.mesh is None or p.mesh.size() < scope.size]
    replicated = [i for i, p in enumerate(placements) if any(t.is_replicate() for t in p.torch_placements)]
    # An empty list proves nothing either: the ranks that hold something are already asking.
    if scope.size == 1 or (parameters and not unproven and not replicated):
        return {}
    group = scope.group()
    device = message_device(group, [p.tensor for p in parameters])
    _require_same_count(parameters, group, device)

    if not parameters:
        return {}
    facts = torch.tensor(
        [
            [_hash(p.name), _hash(f"{tuple(p.tensor.shape)} {p.tensor.dtype} {placement.label}")]
            for p, placement in zip(parameters, placements, strict=True)
        ],
        dtype=torch.float64,
        device=device,
    )  # [n, 2]
    values = _fingerprints(parameters, placements, unproven, lambda p, _: p, device)
    gradients = _fingerprints(parameters, placements, unproven, _settled_gradient, device)
    partial = torch.tensor([_partial_code(p.tensor) for p in parameters], dtype=torch.float64, device=device)

    words = torch.cat([facts, values, gradients], dim=1)  # [n, 2 + 2 * _WORDS]
    message = torch.cat([words.flatten(), -words.flatten().nan_to_num(nan=math.inf), partial])
    message[: words.numel()].nan_to_num_(nan=-math.inf)  # no evidence: loses against any
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    high, low, codes = torch.split(message, [words.numel(), words.numel(), len(parameters)])
    spread = (high + low).view_as(words).cpu()
    for what, columns, tolerance in (
        ("name", slice(0, 1), 0.5),
        ("shape, dtype or placement", slice(1, 2), 0.5),
        ("value", slice(2, 2 + _WORDS), _TOLERANCE),
        ("gradient", slice(2 + _WORDS, None), _TOLERANCE),
    ):
        differing = (spread[:, columns] > tolerance).any(dim=1).nonzero().flatten().tolist()
        if differing:
            raise OwnershipError(_explain(what, differing, parameters, placements, scope))
    return {i: _decode(int(code)) for i, code in enumerate(codes.tolist()) if code}


def _require_same_count(
    parameters: Sequence[NamedParameter], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    n = len(parameters)
    message = torch.tensor([n, -n], dtype=torch.float64, device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    most, least = (int(x) for x in message.tolist())
    if most != -least:
        raise OwnershipError(
            f"ranks pass different numbers of parameters: {-least} on some, {most} on others, {n} on rank "
            f"{dist.get_rank()}. Pass all parameters on every rank (a missing gradient counts as zero, so "
            "do not filter by `p.grad is not None`). " + _REMEDIES
        )


def _explain(
    what: str,
    differing: Sequence[int],
    parameters: Sequence[NamedParameter],
    placements: Sequence[Placement],
    scope: Scope,
) -> str:
    first = parameters[differing[0]]
    shown = (
        f"parameter {first.name!r} (shape {tuple(first.tensor.shape)}, {placements[differing[0]].label}, on "
        f"rank {dist.get_rank()})"
    )
    others = f" {len(differing)} parameters are affected." if len(differing) > 1 else ""
    if what == "gradient":
        return (
            f"the gradient of {shown} differs between the {scope.size} ranks in scope, though its value is "
            f"the same on all of them.{others} If these are replicas, their gradients have not been "
            "synchronised: clip outside no_sync(), after the last micro-batch, and wrap the model in DDP "
            f"or FSDP. Otherwise they are no replicas. {_REMEDIES}"
        )
    return (
        f"the {what} of {shown} differs between the {scope.size} ranks in scope, so it is no replica."
        f"{others} {_REMEDIES}"
    )


def _settled_gradient(parameter: Tensor, placement: Placement) -> Tensor | None:
    """The gradient where it lies as the parameter does (a partial one may well differ)."""
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided:
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
    """[n, _WORDS] float64: of the whole tensor, though each rank reads only its own shard of it.

    NaN where there is no evidence: not asked for, or a shard is missing somewhere on the mesh.
    """
    prints = torch.full((len(parameters), _WORDS), math.nan, dtype=torch.float64, device=device)
    rows, samples = [], []
    for i in indices:
        tensor = tensor_of(parameters[i].tensor, placements[i])
        if tensor is not None:
            rows.append(i)
            samples.append(_sample(tensor).to(device))
    if rows:
        prints[rows] = _project(torch.stack(samples))
    # A shard's print counts by its coordinate, so that shards in another order are another tensor.
    # Ranks walk the axes in the same order: that of first appearance in a list that they share.
    axes: dict[str, tuple[Axis, list[int]]] = {}
    for i in indices:
        for axis in placements[i].shards:
            axes.setdefault(axis.group_name, (axis, []))[1].append(i)
    for axis, members in axes.values():
        shard = prints[members] * (1 + math.sin(1 + dist.get_rank(axis.group)))
        dist.all_reduce(shard, group=axis.group)
        prints[members] = shard
    return prints


def _sample(tensor: Tensor) -> Tensor:
    """[_SAMPLES] float64: evenly spaced elements, padded with zeros."""
    local = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()
    if local.is_complex():
        local = torch.view_as_real(local)
    flat = local.reshape(-1)
    flat = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double()
    return torch.nn.functional.pad(flat, (0, _SAMPLES - flat.numel()))


def _project(samples: Tensor) -> Tensor:
    """[k, _SAMPLES] -> [k, _WORDS]: projections of the unit vector, and log2 of the norm.

    NaN, which is no evidence, where a sample is not finite: an overflow may well be one rank's alone.
    """
    samples = torch.where(samples.isfinite().all(dim=1, keepdim=True), samples, math.nan)
    positions = torch.arange(1, _SAMPLES + 1, dtype=torch.float64, device=samples.device)
    turns = torch.arange(1, _PROJECTIONS + 1, dtype=torch.float64, device=samples.device)
    weights = torch.cos(positions[:, None] * turns * 0.7548776662466927 + turns)  # [_SAMPLES, _PROJECTIONS]
    norm = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
    unit = samples / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([unit @ weights, torch.log2(norm).clamp_min(_ZERO_LOG2)], dim=1)


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
