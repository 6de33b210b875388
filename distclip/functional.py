"""Drop-in replacements for the functions of ``torch.nn.utils``, right for parameters that are spread
over ranks in any way."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import kernels
from distclip.apply.change import OnNonfinite, change, resolve
from distclip.current.known import Call, known_of, set_like
from distclip.decide.decision import Scale
from distclip.decide.norms import Norms
from distclip.decide.transfer import bound_on
from distclip.layout.parameters import Parameters, freeze_source, named_parameters
from distclip.measure.gradients import collect
from distclip.measure.reduction import plain, summed
from distclip.measure.slots import Slots
from distclip.planning.plan import build_plan
from distclip.strategies._base import require_bound, require_norm_type, scale_to
from distclip.torch_private.autograd import version


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
    call = Call(
        f"clip_grad_norm_(max_norm={bound}, norm_type={p}, {error_if_nonfinite=})", stages, process_group
    )
    parameters, tensors, entry = known_of(parameters, p, policy, call)
    with entry.alone():
        known, strategy = entry.for_call(call)
        strategy.max_norm = bound
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
    call = Call(f"total_grad_norm(norm_type={p})", stages, process_group)
    parameters, tensors, entry = known_of(parameters, p, "propagate", call)
    with entry.alone():
        known, _ = entry.for_call(call)
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
    known = set_like(holders, p, process_group)
    policy: OnNonfinite = "raise" if error_if_nonfinite else "propagate"
    known.asked.of_step = f"get_total_norm(norm_type={p}, {error_if_nonfinite=})"
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
        setattr(total, _EXACT, (version(total), norms.exact.total))
    return total


def _exact(total: Tensor | float) -> Tensor | float:
    """What a returned norm is in float64, unless it has been written to since."""
    then, exact = getattr(total, _EXACT, (None, total))
    return exact if then is None or (isinstance(total, Tensor) and version(total) == then) else total
