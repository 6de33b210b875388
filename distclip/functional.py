"""Drop-in replacements for the functions of ``torch.nn.utils``, right for parameters that are spread
over ranks in any way."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip import _kernels as kernels
from distclip._apply import OnNonfinite, change, resolve
from distclip._as_called import AsCalled
from distclip._gradients import collect
from distclip._life import life_of
from distclip._parameter_set import ParameterSet
from distclip._parameters import Parameters, bare_tensors, freeze_source, named_parameters
from distclip._placement import Axis
from distclip._plan import build_plan
from distclip.strategies._base import require_bound, require_norm_type


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
    policy: OnNonfinite = "raise" if error_if_nonfinite else "propagate"
    parameters, tensors, known, strategy = _set_of(parameters, p, stages, process_group, policy)
    strategy.bound = bound
    gradients, norms, _ = known.measure(known.make_current(parameters, tensors))
    outcome = resolve(strategy.decide(norms), norms, policy)
    assert gradients is not None and known.measurement is not None  # nothing is measured in backward
    change(outcome, gradients, known.measurement.slots)
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
    p = require_norm_type(norm_type)
    parameters, tensors, known, _ = _set_of(parameters, p, stages, process_group, "propagate")
    return known.measure(known.make_current(parameters, tensors))[1].total


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
        kernels.clamp_(bucket.tensors, torch.full((), bound, device=bucket.tensors[0].device))
    gradients.commit()


# What is known of the lists seen last. A list is found again by the identity of every tensor in it, and what is
# known of it is dropped as soon as one of them dies; its place stays, since garbage collectors do not die in step
# and addresses are used again, and what is evicted next must be the same on every rank. So which list is planned
# anew depends only on which lists are passed: the caller's program, the same on every rank.
_known: dict[tuple[Any, ...], _Entry] = {}
_order: OrderedDict[int, _Entry] = OrderedDict()  # by number, the latest last
_lock = threading.Lock()
_numbers = count()
_MOST_KNOWN = 200_000  # tensors, over all lists


class _Entry:
    """What is known of one list, while all its tensors live."""

    def __init__(self, key: tuple[Any, ...], tensors: list[Tensor], norm_type: float, policy: str) -> None:
        self.number, self.key, self.size = next(_numbers), key, len(tensors)
        self.strategy = AsCalled(norm_type)
        options = {"norm_type": norm_type, "on_nonfinite": policy}
        self.parameters: ParameterSet | None = ParameterSet(self.strategy, keep=False, options=options)
        me = weakref.ref(self)

        def forget(_: object) -> None:
            if (entry := me()) is not None:
                entry.parameters = None

        self._lives = [weakref.ref(life_of(t), forget) for t in tensors if isinstance(t, Tensor)]


def _set_of(
    parameters: Parameters,
    norm_type: float,
    stages: dist.ProcessGroup | DeviceMesh | None,
    process_group: dist.ProcessGroup | DeviceMesh | None,
    policy: str,
) -> tuple[Parameters, list[Tensor], ParameterSet, AsCalled]:
    parameters = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
    tensors = bare_tensors(parameters)
    groups = (_name_of(stages, "stages"), _name_of(process_group, "process_group"))
    key = (norm_type, *groups, *map(id, tensors))
    entry = _known.get(key)
    if entry is None or not torch.compiler.is_compiling():
        with _lock:
            if entry is None or entry.parameters is None:  # its tensors are gone, and these are others
                entry = _Entry(key, tensors, norm_type, policy)
                _known[key] = _order[entry.number] = entry
                while len(_order) > 1 and sum(e.size for e in _order.values()) > _MOST_KNOWN:
                    _, oldest = _order.popitem(last=False)
                    if _known.get(oldest.key) is oldest:
                        del _known[oldest.key]
            _order.move_to_end(entry.number)
    known = entry.parameters
    assert known is not None  # the caller holds its tensors
    known.groups = stages, process_group
    return parameters, tensors, known, entry.strategy


def _name_of(group: dist.ProcessGroup | DeviceMesh | None, argument: str) -> str | None:
    return None if group is None else Axis.along(group, argument).group_name
