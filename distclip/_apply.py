"""Carry a decision out on this rank's gradients, in place, and report it."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from distclip import _kernels as kernels
from distclip._decision import Clamp, Decision, Scale, Then
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

    scale, clamp = parts(decision)
    clipped = torch.zeros_like(nonfinite)
    norm_after = norms.total
    coefficient, bound = None, None
    if scale is not None:
        # A gradient that is left alone is multiplied by exactly 1, never by 0 (0 · NaN is NaN).
        coefficient = torch.where(left_alone, 1.0, scale.coefficient)
        clipped = (coefficient != 1).any()  # also NaN, which is to propagate
        norm_after = torch.where(clipped, _scaled_norm(norms, coefficient), norms.total)
    if clamp is not None:
        bound = torch.where(left_alone, math.inf, clamp.bound)
        if math.isinf(norms.norm_type):
            clipped = clipped | (norm_after > bound)
            norm_after = torch.minimum(norm_after, bound)
        else:  # another norm does not tell whether any element is too large, nor what is left
            clipped = clipped | ~left_alone
            norm_after = torch.where(left_alone, norm_after, math.nan)

    _change(coefficient, bound, clipped, gradients, slots)
    if on_nonfinite == "zero":
        _zero_where(nonfinite, gradients)
        norm_after = torch.where(nonfinite, 0.0, norm_after)
    single = scale is not None and clamp is None and scale.coefficient.dim() == 0
    ratio = torch.where(norm_after == norms.total, 1.0, norm_after / norms.total)
    return ClipReport(
        total_norm=norms.total,
        clipped_norm=norm_after,
        coefficient=coefficient if single and coefficient is not None else ratio,
        threshold=decision.threshold,
        clipped=clipped,
        nonfinite=nonfinite,
        skipped=skipped,
        norm_type=norms.norm_type,
    )


def parts(decision: Decision) -> tuple[Scale | None, Clamp | None]:
    """What is to be done, in this order."""
    if isinstance(decision, Then):
        return decision.first, decision.second
    return (decision, None) if isinstance(decision, Scale) else (None, decision)


def _scaled_norm(norms: Norms, coefficient: Tensor) -> Tensor:
    if coefficient.dim() == 0:
        return norms.total * coefficient
    return combine(norms.slots * coefficient, norms.norm_type)


def _change(
    coefficient: Tensor | None, bound: Tensor | None, clipped: Tensor, gradients: Gradients, slots: Slots
) -> None:
    # On the CPU the flag is simply looked at. On an accelerator that would wait for the device, and a
    # coefficient of exactly 1 changes no bit anyway.
    if clipped.device.type == "cpu" and not clipped.item():
        return
    for bucket in gradients.buckets:
        device = bucket.tensors[0].device
        if coefficient is not None:
            if coefficient.dim() == 0:
                kernels.scale_(bucket.tensors, coefficient.to(device))
            else:
                owners = torch.tensor([slots.of[i] for i in bucket.parameters], device=coefficient.device)
                kernels.scale_each_(bucket.tensors, coefficient[owners].to(device))
        if bound is not None:
            kernels.clamp_(bucket.tensors, bound.to(device))
    gradients.commit()


def _zero_where(condition: Tensor, gradients: Gradients) -> None:
    if condition.device.type == "cpu" and not condition.item():
        return
    for bucket in gradients.buckets:
        kernels.fill_where_(bucket.tensors, 0.0, condition.to(bucket.tensors[0].device))
    gradients.commit()
