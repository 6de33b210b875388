"""Drop-in replacements for the functions of ``torch.nn.utils``, right for parameters that are spread
over ranks in any way."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip import kernels
from distclip.apply.change import OnNonfinite, change, resolve
from distclip.current.as_called import AsCalled
from distclip.current.parameter_set import ParameterSet
from distclip.decide.decision import Scale
from distclip.decide.norms import Norms
from distclip.decide.transfer import bound_on
from distclip.layout.life import life_of
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source, named_parameters
from distclip.layout.placement import Axis
from distclip.measure.gradients import collect
from distclip.measure.reduction import plain, summed
from distclip.measure.slots import Slots
from distclip.planning.plan import build_plan
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
    policy: OnNonfinite = "raise" if error_if_nonfinite else "propagate"
    parameters, tensors, entry = _known_of(parameters, p, stages, process_group, policy)
    with entry.alone():
        known, strategy = entry.for_call(stages, process_group)
        strategy.bound = bound
        if not torch.compiler.is_compiling():
            known.asked = f"clip_grad_norm_(max_norm={bound}, error_if_nonfinite={error_if_nonfinite})"
        gradients, norms, _ = known.measure(known.make_current(parameters, tensors))
        outcome = resolve(strategy.decide(norms), norms, policy)
        assert gradients is not None
        assert known.measurement is not None
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
    parameters, tensors, entry = _known_of(parameters, p, stages, process_group, "propagate")
    with entry.alone():
        known, _ = entry.for_call(stages, process_group)
        if not torch.compiler.is_compiling():
            known.asked = "total_grad_norm()"
        return _with_exact(known.measure(known.make_current(parameters, tensors))[1])


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """The norm of gradients taken together, as :func:`torch.nn.utils.get_total_norm` and right for DTensors
    of any placement. To be called by every rank, with as many gradients on each; changes nothing.

    One all-reduce at most (and one for each gradient that is ``Partial``). Plain tensors count as copies
    where ranks hold the same, which is compared at calls 1, 2, 4, 8, … with gradients of these shapes; where
    they do not, nothing tells how they lie: use :func:`total_grad_norm`, whose parameters do.

    Args:
        tensors: gradients, ``[p.grad for p in parameters if p.grad is not None]``.
        norm_type, error_if_nonfinite, process_group: as for :func:`clip_grad_norm_`.
        foreach: accepted for compatibility; the result does not depend on it.

    Returns:
        A plain 0-dim float32 tensor, the same on every rank.

    Raises:
        ValueError: parameters were passed, whose own norm is rarely meant.
        OwnershipError: on every rank: plain gradients differ between ranks.
        NonFiniteError: see ``error_if_nonfinite``.

    Example:
        >>> norm = distclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        >>> distclip.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    """
    p = require_norm_type(norm_type)
    gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    holders: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        if not isinstance(gradient, Tensor):
            raise TypeError(f"tensors[{i}] is a {type(gradient).__name__}, expected a gradient (a Tensor)")
        if isinstance(gradient, nn.Parameter):
            raise ValueError(
                f"tensors[{i}] (shape {tuple(gradient.shape)}) is a parameter, and this takes gradients: "
                "for their norm call distclip.total_grad_norm(parameters). For that of the parameters "
                "themselves pass [p.detach() for p in parameters]."
            )
        whole = summed(gradient)
        holder = whole.detach()
        holder.grad = whole.detach()
        holders.append(holder)
    known = _set_like(holders, p, process_group)
    policy: OnNonfinite = "raise" if error_if_nonfinite else "propagate"
    known.asked = f"get_total_norm(error_if_nonfinite={error_if_nonfinite})"
    named = [(f"tensors[{i}]", holder) for i, holder in enumerate(holders)]
    norms = known.measure(known.make_current(named, holders))[1]
    unchanged = Scale(torch.ones_like(norms.total), torch.full_like(norms.total, math.inf))
    resolve(unchanged, norms, policy)  # raises
    return _with_exact(norms)


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor | float, foreach: bool | None = None
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``, with a norm that is known
    already.

    As :func:`torch.nn.utils.clip_grads_with_norm_`. Needs no other rank: every rank scales what it holds by
    the same number, if ``total_norm`` is the same on every rank (that of :func:`get_total_norm` and
    :func:`total_grad_norm` is). Gradients below the threshold are left bit for bit as they were.

    Args:
        parameters: as for :func:`clip_grad_norm_`; not the gradients.
        max_norm: largest allowed norm, ≥ 0.
        total_norm: [] of any float dtype, a DTensor too, or a number. (What float32 does not hold is not
            lost on the way from :func:`get_total_norm`: the tensor that this returns knows it.)
        foreach: accepted for compatibility; the result does not depend on it.

    Raises:
        ValueError: an argument cannot be meant.

    Example:
        >>> distclip.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    """
    bound = require_bound("max_norm", max_norm)
    named = named_parameters(freeze_source(parameters))
    plan = build_plan(named, alone=True)
    gradients = collect(plan, [p.tensor for p in named])
    norm = torch.as_tensor(plain(_exact(total_norm)), dtype=torch.float64, device=plan.device)
    if norm.numel() != 1:
        raise ValueError(f"total_norm has shape {tuple(norm.shape)}: expected one number")
    norms = Norms.from_power_sums(norm.reshape(1), math.inf, ("total",))
    decision = Scale(scale_to(norms.total, bound, 1e-6), torch.full_like(norms.total, bound))
    change(resolve(decision, norms, "propagate"), gradients, Slots(("total",), (0,) * len(plan.parameters)))


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


# Where float32 does not hold a norm that is returned, what it is stays with it.
_EXACT = "_distclip_exact"


def _with_exact(norms: Norms) -> Tensor:
    total = norms.reported_total
    if norms.exact is not None and not (torch.compiler.is_compiling() or total.is_inference()):
        setattr(total, _EXACT, (total._version, norms.exact.total))
    return total


def _exact(total: Tensor | float) -> Tensor | float:
    """What a returned norm is in float64, unless it has been written to since."""
    version, exact = getattr(total, _EXACT, (None, total))
    return exact if version is None or (isinstance(total, Tensor) and total._version == version) else total


# What is known of the lists seen last. A list is found again by the identity of every tensor in it, and what
# is known of it ends as soon as one of them dies; its place stays, since garbage collectors do not work in
# step and addresses are used again, and what is evicted next must be the same on every rank. So which list
# is planned anew depends only on which lists are passed: the caller's program, the same on every rank.
_known: dict[tuple[Any, ...], _Entry] = {}
_order: OrderedDict[int, _Entry] = OrderedDict()  # by number, the latest last
_lock = threading.Lock()  # for these two
_numbers = count()
_MOST_KNOWN = 200_000  # tensors, over all lists


class _Entry:
    """What is known of one list.

    Attributes:
        set: what is known.
        parameters: likewise, None once a tensor of it has died, whose address may be another's.
        meshes: over which its tensors lie; None for plain ones.
    """

    def __init__(self, key: tuple[Any, ...], tensors: list[Tensor], norm_type: float, policy: str) -> None:
        self.number, self.key, self.size = next(_numbers), key, len(tensors)
        self._lock = threading.RLock()
        self.strategy = AsCalled(norm_type)
        options = {"norm_type": norm_type, "on_nonfinite": policy}
        self.set = ParameterSet(self.strategy, keep=False, options=options)
        self.parameters: ParameterSet | None = self.set
        self.meshes = _meshes_of(tensors)
        me = weakref.ref(self)

        def end(_: object) -> None:
            if (entry := me()) is not None:
                entry.parameters = None

        self._lives = [weakref.ref(life_of(t), end) for t in tensors if isinstance(t, Tensor)]

    @property
    def living(self) -> list[int]:
        """The ids of its tensors that still live."""
        return [life.owner for reference in self._lives if (life := reference()) is not None]

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """Around a call: another thread may measure the same parameters."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def for_call(
        self,
        stages: dist.ProcessGroup | DeviceMesh | None,
        process_group: dist.ProcessGroup | DeviceMesh | None,
    ) -> tuple[ParameterSet, AsCalled]:
        known = self.parameters
        assert known is not None  # the caller holds its tensors
        known.groups = stages, process_group
        return known, self.strategy


def _known_of(
    parameters: Parameters,
    norm_type: float,
    stages: dist.ProcessGroup | DeviceMesh | None,
    process_group: dist.ProcessGroup | DeviceMesh | None,
    policy: str,
) -> tuple[Parameters, list[Tensor], _Entry]:
    parameters = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
    tensors = bare_tensors(parameters)
    asked = (norm_type, _name_of(stages, "stages"), _name_of(process_group, "process_group"))
    key = (*asked, *map(id, tensors))
    entry, former = _known.get(key), None
    if entry is None or not torch.compiler.is_compiling():
        with _lock:
            if entry is None or entry.parameters is None:  # its tensors are gone, and these are others
                former = _former_list(parameters, asked, tensors)
                entry = _Entry(key, tensors, norm_type, policy)
                _known[key] = _order[entry.number] = entry
                while len(_order) > 1 and sum(e.size for e in _order.values()) > _MOST_KNOWN:
                    _, oldest = _order.popitem(last=False)
                    if _known.get(oldest.key) is oldest:
                        del _known[oldest.key]
            if entry.number in _order:
                _order.move_to_end(entry.number)
    if former is not None:
        former.leave(entry.set)
    if entry.parameters is not None and not torch.compiler.is_compiling():
        _note_source(parameters, asked, entry.parameters)
    return parameters, tensors, entry


def _former_list(
    parameters: Parameters, asked: tuple[Any, ...], tensors: list[Tensor]
) -> ParameterSet | None:
    """What is known of the list that this new one has come from, where the caller makes lists: the latest
    that shares a tensor with it. Its meshes are among these here, and so are its ranks: those for which
    nothing has changed wait in its step, and are told."""
    if not isinstance(parameters, list | tuple) or any(isinstance(p, nn.Module) for p in parameters):
        return None
    if asked[1] is not None:
        return None  # what has become of the lists of other stages is not known
    ids, meshes = set(map(id, tensors)), _meshes_of(tensors)
    for entry in reversed(_order.values()):
        if entry.key[: len(asked)] == asked and not ids.isdisjoint(entry.living):
            return entry.set if entry.meshes <= meshes else None
    return None


def _meshes_of(tensors: Iterable[Any]) -> set[DeviceMesh | None]:
    return {t.device_mesh if isinstance(t, DTensor) else None for t in tensors}


# By the module or optimizer (the first, of several modules) that a list was last read from, and by what was
# asked of it: the other modules, and what is known of the list.
_latest: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[list[Any], ParameterSet]]]
_latest = weakref.WeakKeyDictionary()


def _note_source(parameters: Parameters, asked: tuple[Any, ...], known: ParameterSet) -> None:
    """Where these modules hold another list than in the last call, the ranks that did not see that change,
    and so wait in the step of the former list, are told.

    Raises:
        OwnershipError: on every rank: not all see it.
    """
    source: list[Any] = list(parameters) if isinstance(parameters, list | tuple) else [parameters]
    if not source or not all(isinstance(part, nn.Module | torch.optim.Optimizer) for part in source):
        return
    first, *others = source
    asked = (*asked, len(others))
    try:
        latest = _latest.setdefault(first, {})
    except TypeError:
        return  # of a class whose objects cannot be told apart
    before = latest.get(asked)
    if before is not None and before[1] is known:
        return
    if before is not None and all(ref() is part for ref, part in zip(before[0], others, strict=True)):
        before[1].leave(known)
    latest[asked] = [weakref.ref(part) for part in others], known


class _Alike(threading.local):
    """What this thread knows of gradients, by how they lie, the latest last."""

    def __init__(self) -> None:
        self.sets: OrderedDict[tuple[Any, ...], ParameterSet] = OrderedDict()


_alike = _Alike()
_MOST_ALIKE = 64


def _set_like(
    gradients: list[Tensor], norm_type: float, process_group: dist.ProcessGroup | DeviceMesh | None
) -> ParameterSet:
    """What is known of gradients that lie like these: they are other tensors in every step."""
    lies = (
        (
            t.shape,
            t.dtype,
            t.device.type,
            (t.device_mesh, t.placements) if isinstance(t, DTensor) else None,
        )
        for t in gradients
    )
    key = (norm_type, _name_of(process_group, "process_group"), *lies)
    sets = _alike.sets
    known = sets.get(key)
    if known is None or any(isinstance(t, FakeTensor) for t in gradients):
        known = ParameterSet(AsCalled(norm_type), keep=False, options={"norm_type": norm_type})
        if not any(isinstance(t, FakeTensor) for t in gradients):  # nothing of a fake mode outlives it
            sets[key] = known
            if len(sets) > _MOST_ALIKE:
                sets.popitem(last=False)
    if key in sets:
        sets.move_to_end(key)
    known.groups = None, process_group
    return known


def _name_of(group: dist.ProcessGroup | DeviceMesh | None, argument: str) -> str | None:
    return None if group is None else Axis.along(group, argument).group_name


def _forget() -> None:
    """In a process that has been forked, perhaps while another thread held the locks."""
    global _lock
    _lock = threading.Lock()
    _known.clear()
    _order.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
