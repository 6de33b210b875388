"""Unscaling gradients of any placement, for those who keep torch's order of calls."""

from __future__ import annotations

import torch
from torch.amp.grad_scaler import GradScaler, OptState

from distclip import kernels
from distclip.apply.loss_scale import LossScale, record, told
from distclip.apply.optimizer_step import require_covered
from distclip.clipper import Clipper, clipping_of
from distclip.torch_private.grad_scaler import states


@torch.no_grad()
def unscale_(scaler: GradScaler, optimizer: torch.optim.Optimizer, clipper: Clipper) -> None:
    """``scaler.unscale_(optimizer)``, right for gradients that are spread over ranks in any way.

    For those who keep torch's order of calls: ``scaler.scale(loss).backward()``, this,
    ``clipper.clip()``, ``scaler.step(optimizer)``, ``scaler.update()``. (``clipper.step(optimizer, scaler)``
    does all of it in fewer passes.) Whether infinities were found is decided on the reduced norm of all the
    clipper's gradients, alike on every rank; DTensor and plain parameters mix. Every rank calls it.

    Raises:
        ValueError: the optimizer has been unscaled already, holds a parameter that the clipper does not, or
            the gradients are not synchronised yet.

    Example:
        >>> scaler.scale(loss).backward()
        >>> distclip.unscale_(scaler, optimizer, clipper)
        >>> report = clipper.clip()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """
    clipping = clipping_of(clipper)
    plan = clipping.begin(told(scaler, [optimizer]))
    try:
        require_covered([optimizer], clipping.tensors)
        if scaler.is_enabled():
            _ = states(scaler)[id(optimizer)]  # where clipper.step() has just used them, this says so
        loss_scale = LossScale.of(scaler, [optimizer], plan.device if plan.scope.stages else None)
        if loss_scale.scaler is not None and loss_scale.inverse is None:
            raise ValueError(
                "the gradients of this optimizer have been unscaled already since scaler.update()"
            )
    except ValueError:
        clipping.decline()
        raise
    if loss_scale.scaler is None or loss_scale.inverse is None:
        return
    gradients, norms = clipping.measure()
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for bucket in gradients.buckets:
        mine = [
            tensor
            for tensor, i in zip(bucket.tensors, bucket.parameters, strict=True)
            if id(clipping.tensors[plan.positions[i]]) in own
        ]
        if mine:
            kernels.scale_(mine, loss_scale.inverse.to(mine[0].device))
    gradients.rebuilt[:] = [(p, g) for p, g in gradients.rebuilt if id(p) in own]
    gradients.commit()
    record(scaler, optimizer, ~torch.isfinite(norms.total), OptState.UNSCALED)
