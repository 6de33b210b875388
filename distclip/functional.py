"""Drop-in replacements for the functions of ``torch.nn.utils``, right for parameters that are spread
over ranks in any way."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip import _kernels as kernels
from distclip._apply import OnNonfinite, change, resolve
from distclip._decision import Scale
from distclip._gradients import Gradients, collect
from distclip._in_backward import require_gradients_after_backward
from distclip._meter import Meter
from distclip._parameters import Parameters, bare_tensors, freeze_source, named_parameters
from distclip._placement import Axis
from distclip._plan import build_plan
from distclip._runs import Collector
from distclip._slots import Slots
from distclip._transfer import bound_on
from distclip.strategies._base import require_bound, require_norm_type, scale_to


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    stages: dist.ProcessGroup | DeviceMesh | None = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Clip the norm of all gradients taken together, in place. To be called by every rank.

    The norm is that of the whole gradient, whatever rank holds which part of it; the coefficient is
    ``min(1, max_norm / (norm + 1e-6))`` as in :func:`torch.nn.utils.clip_grad_norm_`. Gradients below
    the threshold are left bit for bit as they were.

    Args:
        parameters: a Module, several Modules, an Optimizer, a Tensor, or an iterable of Tensors or of
            ``(name, Tensor)``. Give all of them on every rank; a missing gradient counts as zero.
        max_norm: largest allowed norm, ≥ 0; ∞ only measures.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.
        error_if_nonfinite: raise on every rank if the norm is NaN or infinite (waits for the device).
            Otherwise such a norm propagates into the gradients, as with torch.
        foreach: accepted for compatibility; the result does not depend on it.
        stages: the ranks of one pipeline, each of which holds other parameters (ProcessGroup or 1-D
            DeviceMesh).
        process_group: the ranks that together hold the model, where the parameters do not tell.

    Returns:
        The norm before clipping: a plain 0-dim float32 tensor, the same on every rank.

    Raises:
        ValueError: an argument cannot be meant.
        OwnershipError: on every rank: plain parameters differ between ranks.
        NonFiniteError: see ``error_if_nonfinite``.

    Example:
        >>> loss.backward()
        >>> norm = distclip.clip_grad_norm_(model.parameters(), max_norm=1.0)
        >>> optimizer.step()
    """
    bound, p = require_bound("max_norm", max_norm), require_norm_type(norm_type)
    gradients, meter = _prepare(parameters, p, stages, process_group)
    norms = meter(gradients)
    # GlobalNorm(bound, p).forward, which cannot be made inside a compiled step
    decision = Scale(scale_to(norms.total, bound, 1e-6), torch.full_like(norms.total, bound))
    policy: OnNonfinite = "raise" if error_if_nonfinite else "propagate"
    outcome = resolve(decision, norms, policy)
    change(outcome, gradients, meter.slots)
    return outcome.report.total_norm


@torch.no_grad()
def total_grad_norm(
    parameters: Parameters,
    norm_type: float | str = 2.0,
    *,
    stages: dist.ProcessGroup | DeviceMesh | None = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """The norm of all gradients taken together. To be called by every rank; changes nothing.

    ``parameters`` are parameters, not gradients. Arguments, result and errors are those of
    :func:`clip_grad_norm_`.

    Example:
        >>> norm = distclip.total_grad_norm(model)
    """
    gradients, meter = _prepare(parameters, require_norm_type(norm_type), stages, process_group)
    return meter(gradients).reported_total


@torch.no_grad()
def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, in place; complex ones by magnitude.

    An element is clamped the same wherever it lives, so this needs no other rank, except that DTensor
    gradients still waiting for a sum (``Partial``) are summed first, with every rank of their mesh (each of
    which must have that gradient, as backward leaves it). NaN stays NaN; a complex infinity becomes NaN.

    Args:
        parameters: as for :func:`clip_grad_norm_`.
        clip_value: the bound, ≥ 0.
        foreach: accepted for compatibility; the result does not depend on it.

    Raises:
        ValueError: an argument cannot be meant.

    Example:
        >>> distclip.clip_grad_value_(model.parameters(), 0.5)
    """
    bound = require_bound("clip_value", clip_value)
    named = named_parameters(freeze_source(parameters))
    gradients = collect(build_plan(named, alone=True), [p.tensor for p in named])
    for bucket in gradients.buckets:
        kernels.clamp_(bucket.tensors, bound_on(bucket.tensors[0].device, bound))
    gradients.commit()


@dataclass(frozen=True, eq=False)
class _Prepared:
    tensors: tuple[weakref.ref[Tensor], ...]
    meter: Meter
    collect: Collector

    def is_for(self, tensors: list[Tensor]) -> bool:
        same = all(ref() is t for ref, t in zip(self.tensors, tensors, strict=True))
        return same and self.meter.plan.fits(tensors)


# The plans of the lists seen last. A plan is found again by the identity of every parameter in the list,
# and dropped as soon as one of them dies; its key stays, since garbage collectors do not die in step, and
# what is evicted next must be the same on every rank. So which list is planned anew depends only on which
# lists are passed: the caller's program, the same on every rank.
_prepared: OrderedDict[tuple[Any, ...], _Prepared | None] = OrderedDict()
_MOST_PREPARED = 200_000  # tensors, over all lists


def _prepare(
    parameters: Parameters,
    norm_type: float,
    stages: dist.ProcessGroup | DeviceMesh | None,
    process_group: dist.ProcessGroup | DeviceMesh | None,
) -> tuple[Gradients, Meter]:
    parameters = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
    tensors = bare_tensors(parameters)
    key = (norm_type, _name_of(stages, "stages"), _name_of(process_group, "process_group"), *map(id, tensors))
    entry = _prepared.get(key)
    if entry is None or not entry.is_for(tensors):
        named = named_parameters(parameters)
        require_gradients_after_backward(named)
        plan = build_plan(named, process_group, stages)
        slots = Slots(("total",), (0,) * len(plan.parameters))
        meter = Meter(plan, slots, norm_type, torch.float32)

        def forget(_: object) -> None:
            if key in _prepared:
                _prepared[key] = None

        collector = Collector(plan, plan.multiplicities)
        entry = _Prepared(tuple(weakref.ref(t, forget) for t in tensors), meter, collector)
        _prepared[key] = entry
        while len(_prepared) > 1 and sum(map(len, _prepared)) > _MOST_PREPARED:
            _prepared.popitem(last=False)
    _prepared.move_to_end(key)
    return entry.collect(tensors), entry.meter


def _name_of(group: dist.ProcessGroup | DeviceMesh | None, argument: str) -> str | None:
    return None if group is None else Axis.along(group, argument).group_name
