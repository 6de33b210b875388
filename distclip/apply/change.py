"""From a decision to what happens: policies and report first, then the change, in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from distclip import kernels
from distclip.decide.decision import Clamp, Decision, Scale, Then
from distclip.decide.norms import LARGEST, Norms, combine
from distclip.decide.report import ClipReport
from distclip.errors import NonFiniteError
from distclip.measure.gradients import Gradients
from distclip.measure.slots import Slots
from distclip.measure.units import Units

OnNonfinite: TypeAlias = Literal["skip", "raise", "zero", "propagate"]

_TINIEST = torch.finfo(torch.float32).tiny  # below it float32 loses digits


def require_policy(on_nonfinite: str) -> OnNonfinite:
    if on_nonfinite not in get_args(OnNonfinite):
        raise ValueError(f"{on_nonfinite=}: expected one of {', '.join(map(repr, get_args(OnNonfinite)))}")
    return on_nonfinite  # type: ignore[return-value]  # narrowed by the line above


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is to be done with the gradients of this step, all policies considered, and its report.

    Attributes:
        coefficient: [] or [num_slots] to multiply by, or None for no multiplication; float32, or float64
            where the norms may be so large that float32 does not hold it.
        bound: [] float32 to clamp to, after that, or None; in units of ``bound_unit``, if that is given.
        factor: [] float32 to multiply by beside, 1 / loss scale say, 1 where gradients are left alone.
        zero: [] bool, where to set every gradient to zero instead, or None.
        may_skip: whether ``report.skipped`` can be true at all.
    """

    report: ClipReport
    coefficient: Tensor | None
    bound: Tensor | None
    bound_unit: Callable[[Tensor], Tensor | None] | None
    factor: Tensor | None
    zero: Tensor | None
    may_skip: bool


def resolve(
    decision: Decision, norms: Norms, on_nonfinite: OnNonfinite, factor: Tensor | None = None
) -> Outcome:
    """``decision``, unless the policy on non-finite norms says otherwise.

    All that is decided here is decided on the reduced norms, so on every rank alike, and before any
    gradient is touched.

    Args:
        norms: of the gradients times ``factor``.
        factor: what the gradients are still to be multiplied by.

    Raises:
        NonFiniteError: the norm is not finite and the policy is ``"raise"`` (which waits for the device).
    """
    nonfinite = ~(norms.total < math.inf)  # a norm is never −∞
    total = norms.reported_total
    if on_nonfinite == "raise" and nonfinite.item():
        raise NonFiniteError(
            f"the total norm of order {norms.norm_type:g} of the gradients is {total.item()}, so they "
            "cannot be clipped; no gradient was changed"
        )
    left_alone = torch.zeros_like(nonfinite) if on_nonfinite == "propagate" else nonfinite
    skipped = nonfinite if on_nonfinite == "skip" else torch.zeros_like(nonfinite)
    if decision.skip is not None:
        left_alone, skipped = left_alone | decision.skip, skipped | decision.skip

    scale, clamp = parts(decision)
    norm_after = total
    coefficient, bound = None, None
    if scale is not None:
        # A gradient that is left alone is multiplied by exactly 1, never by 0 (0 · NaN is NaN).
        coefficient = torch.where(left_alone, 1.0, _exact_coefficient(scale, norms))
        clipped = coefficient != 1  # also NaN, which is to propagate
        norm_after = _norm_after(coefficient, norms)
        if coefficient.dim():
            clipped = clipped.any()
            norm_after = torch.where(clipped, norm_after, total)
    else:
        clipped = torch.zeros_like(nonfinite)
    if clamp is not None:
        bound = torch.where(left_alone, math.inf, clamp.bound)
        if clamp.clipped_norm is not None:
            clipped = clipped | ((clamp.clipped_norm < norm_after) & ~left_alone)
            norm_after = torch.where(left_alone, norm_after, clamp.clipped_norm)
        elif math.isinf(norms.norm_type) and clamp.unit is None:
            clipped = clipped | (norm_after > bound)
            norm_after = torch.minimum(norm_after, bound)
        else:  # another norm does not tell whether any element is too large, nor what is left
            clipped = clipped | ~left_alone
            norm_after = torch.where(left_alone, norm_after, math.nan)
    if on_nonfinite == "zero":
        norm_after = torch.where(nonfinite, 0.0, norm_after)

    if coefficient is not None and clamp is None and coefficient.dim() == 0:
        whole_coefficient = coefficient.float()
    else:
        whole_coefficient = torch.where(norm_after == total, 1.0, norm_after / total)
    report = ClipReport(
        total_norm=total,
        clipped_norm=norm_after,
        coefficient=whole_coefficient,
        threshold=decision.threshold,
        clipped=clipped,
        nonfinite=nonfinite,
        skipped=skipped,
        norm_type=norms.norm_type,
        direction=None if clamp is None else clamp.direction,
        loss=norms.loss,
    )
    return Outcome(
        report,
        coefficient,
        bound,
        None if clamp is None else clamp.unit,
        None if factor is None else torch.where(left_alone, 1.0, factor),
        nonfinite if on_nonfinite == "zero" else None,
        on_nonfinite == "skip" or decision.skip is not None,
    )


def _exact_coefficient(scale: Scale, norms: Norms) -> Tensor:
    """The coefficient as it is to be applied, float64 where the norms may be large.

    The strategy has seen a norm beyond float32 as float32's largest number: what that cut off is multiplied
    into the coefficient. And one too small for float32, which has only some digits of it or none, is taken
    from the threshold, if that is what it stands for as far as its digits tell. A float64 coefficient is the
    strategy's own work.
    """
    given = scale.coefficient
    if norms.exact is None or given.dtype == torch.float64:
        return given
    seen, exact = (norms.slots, norms.exact.slots) if given.dim() else (norms.total, norms.exact.total)
    coefficient = given.double()
    if scale.threshold.dim() <= given.dim():
        wanted = scale.threshold.double() / seen.double()
        lost = (coefficient <= _TINIEST) & ((wanted - coefficient).abs() <= _TINIEST)
        coefficient = torch.where(lost, wanted, coefficient)
    cut = (exact > LARGEST) & (exact < math.inf) & (coefficient < 1)
    return torch.where(cut, coefficient * (seen / exact), coefficient)


def _norm_after(coefficient: Tensor, norms: Norms) -> Tensor:
    """[] float32, the norm that multiplying leaves."""
    usual = coefficient.float()
    whole = usual.dim() == 0
    after = norms.total * usual if whole else combine(norms.slots * usual, norms.norm_type)
    if norms.exact is None:
        return after
    exact = norms.exact
    exactly = exact.total * coefficient if whole else combine(exact.slots * coefficient, norms.norm_type)
    beyond = (exact.total > LARGEST) | (coefficient < _TINIEST).any()
    return torch.where(beyond, exactly.float(), after)


def parts(decision: Decision) -> tuple[Scale | None, Clamp | None]:
    """What is to be done, in this order."""
    if isinstance(decision, Then):
        return decision.first, decision.second
    return (decision, None) if isinstance(decision, Scale) else (None, decision)


def changes(outcome: Outcome, *, offloaded: bool = False) -> bool:
    """Whether anything is to be done to the gradients, as far as the host can know without waiting.

    On the CPU the flags are simply looked at. On an accelerator that would wait for the device, and a
    coefficient of exactly 1 changes no bit anyway. Unless all gradients are ``offloaded`` to the CPU, where
    the coefficient has to arrive before they can be multiplied.
    """
    changed = outcome.report.clipped
    if torch.compiler.is_compiling() or not (changed.is_cpu or offloaded):
        return True
    if changed.is_cpu and type(changed) is not Tensor:
        return True  # a fake one has no value
    if outcome.factor is not None:
        changed = changed | (outcome.factor != 1)
    if outcome.zero is not None:
        changed = changed | outcome.zero
    return bool(changed.item())


def change(outcome: Outcome, gradients: Gradients, slots: Slots | Units) -> None:
    """Do to the gradients what has been resolved; where that is nothing, no bit of them changes."""
    devices = {bucket.tensors[0].device.type for bucket in gradients.buckets}
    if not changes(outcome, offloaded=devices == {"cpu"}):
        return
    coefficient, factor, bound = outcome.coefficient, outcome.factor, outcome.bound
    if factor is not None:
        coefficient = factor if coefficient is None else coefficient * factor
    if coefficient is not None or bound is not None:
        for bucket in gradients.buckets:
            device = bucket.tensors[0].device
            if coefficient is not None and coefficient.dim() == 0:
                kernels.scale_(bucket.tensors, coefficient.to(device))
            elif coefficient is not None:
                slots.scale_(bucket, coefficient, gradients.rows)
            if bound is not None and outcome.bound_unit is None:
                kernels.clamp_(bucket.tensors, bound.to(device))
            elif bound is not None and outcome.bound_unit is not None:
                for tensor, i in zip(bucket.tensors, bucket.parameters, strict=True):
                    unit = outcome.bound_unit(gradients.parameters[i])
                    if unit is not None:
                        kernels.clamp_each_(tensor, bound.to(device), unit)
    if outcome.zero is not None:
        for bucket in gradients.buckets:
            kernels.fill_where_(bucket.tensors, 0.0, outcome.zero.to(bucket.tensors[0].device))
    gradients.commit()
