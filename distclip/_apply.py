"""Carry a decision out on this rank's gradients, in place, and report it."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from distclip import _kernels as kernels
from distclip._decision import Clamp, Decision, Scale
from distclip._gradients import Gradients
from distclip._norms import Norms, combine
from distclip._report import ClipReport
from distclip._slots import Slots
from distclip.errors import NonFiniteError

OnNonfinite: TypeAlias = Literal["skip", "raise", "zero", "propagate"]


def require_policy(on_nonfinite: str) -> OnNonfinite:
    if on_nonfinite not in get_args(OnNonfinite):
        raise ValueError(f"{on_nonfinite=}: expected one of {', '.join(map(repr, get_args(OnNonfinite)))}")
    return on_nonfinite  # type: ignore[return-value]  # narrowed by the line above


def carry_out(
    decision: Decision, norms: Norms, gradients: Gradients, slots: Slots, on_nonfinite: OnNonfinite
) -> ClipReport:
    """Apply ``decision`` unless the policy on non-finite norms says otherwise.

    All that is decided here is decided on the reduced norms, so on every rank alike, and before any
    gradient is touched.

    Raises:
        NonFiniteError: the norm is not finite and the policy is ``"raise"`` (which waits for the device).
    """
    nonfinite = ~torch.isfinite(norms.total)
    if on_nonfinite == "raise" and nonfinite.item():
        raise NonFiniteError(
            f"the total norm of order {norms.norm_type:g} of the gradients is {norms.total.item()}, so they "
            "cannot be clipped; no gradient was changed"
        )
    left_alone = torch.zeros_like(nonfinite) if on_nonfinite == "propagate" else nonfinite
    skipped = nonfinite if on_nonfinite == "skip" else torch.zeros_like(nonfinite)
    if decision.skip is not None:
        left_alone, skipped = left_alone | decision.skip, skipped | decision.skip

    if isinstance(decision, Scale):
        # A gradient that is left alone is multiplied by exactly 1, never by 0 (0 · NaN is NaN).
        decision = Scale(torch.where(left_alone, 1.0, decision.coefficient), decision.threshold)
        clipped = (decision.coefficient != 1).any()  # also NaN, which is to propagate
    else:
        clipped = (norms.total > decision.bound) & ~left_alone
        if not math.isinf(norms.norm_type):  # another norm does not tell whether any element is too large
            clipped = ~left_alone
        decision = Clamp(torch.where(left_alone, math.inf, decision.bound))

    clipped_norm = torch.where(clipped, _norm_after(decision, norms), norms.total)
    _change(decision, clipped, gradients, slots)
    if on_nonfinite == "zero":
        _zero_where(nonfinite, gradients)
        clipped_norm = torch.where(nonfinite, 0.0, clipped_norm)
    return ClipReport(
        total_norm=norms.total,
        clipped_norm=clipped_norm,
        coefficient=_ratio(decision, norms, clipped_norm),
        threshold=decision.threshold,
        clipped=clipped,
        nonfinite=nonfinite,
        skipped=skipped,
        norm_type=norms.norm_type,
    )


def _norm_after(decision: Decision, norms: Norms) -> Tensor:
    if isinstance(decision, Scale):
        if decision.coefficient.dim() == 0:
            return norms.total * decision.coefficient
        return combine(norms.slots * decision.coefficient, norms.norm_type)
    if math.isinf(norms.norm_type):
        return torch.minimum(norms.total, decision.bound)
    return torch.full_like(norms.total, math.nan)  # not known in closed form


def _ratio(decision: Decision, norms: Norms, clipped_norm: Tensor) -> Tensor:
    if isinstance(decision, Scale) and decision.coefficient.dim() == 0:
        return decision.coefficient
    return torch.where(clipped_norm == norms.total, 1.0, clipped_norm / norms.total)


def _change(decision: Decision, clipped: Tensor, gradients: Gradients, slots: Slots) -> None:
    # On the CPU the flag is simply looked at. On an accelerator that would wait for the device, and a
    # coefficient of exactly 1 changes no bit anyway.
    if clipped.device.type == "cpu" and not clipped.item():
        return
    for bucket in gradients.buckets:
        device = bucket.tensors[0].device
        if isinstance(decision, Clamp):
            kernels.clamp_(bucket.tensors, decision.bound.to(device))
        elif decision.coefficient.dim() == 0:
            kernels.scale_(bucket.tensors, decision.coefficient.to(device))
        else:
            coefficient = decision.coefficient
            owners = torch.tensor([slots.of[i] for i in bucket.parameters], device=coefficient.device)
            kernels.scale_each_(bucket.tensors, coefficient[owners].to(device))
    gradients.commit()


def _zero_where(condition: Tensor, gradients: Gradients) -> None:
    if condition.device.type == "cpu" and not condition.item():
        return
    for bucket in gradients.buckets:
        kernels.fill_where_(bucket.tensors, 0.0, condition.to(bucket.tensors[0].device))
    gradients.commit()
