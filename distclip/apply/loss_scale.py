"""The loss scale of a ``torch.amp.GradScaler``, read and fed back without a pass over the gradients.

GradScaler's own ``unscale_`` reads and writes every gradient, and looks for infinities on this rank alone,
so that ranks which hold different gradients take different decisions. Here the norm of the scaled
gradients is divided by the scale, unscaling joins the multiplication by the clip coefficient, and "found an
infinity" is what the reduced norm says: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from distclip.kernels.looking import look_at_one
from distclip.torch_private import grad_scaler


@dataclass(frozen=True)
class LossScale:
    """One step's view of a scaler.

    Attributes:
        inverse: [] float32, 1 / scale; None where the gradients are not scaled (any more).
    """

    scaler: GradScaler | None
    optimizers: Sequence[torch.optim.Optimizer]
    inverse: Tensor | None

    @staticmethod
    def of(
        scaler: GradScaler | None,
        optimizers: Sequence[torch.optim.Optimizer],
        stage_device: torch.device | None = None,
    ) -> LossScale:
        """
        Args:
            stage_device: that of a pipeline stage, which may never see a loss: its scaler starts here, at
                the same scale as that of the last stage.

        Raises:
            ValueError: the scaler has not scaled anything yet, or has been stepped already, or some of the
                optimizers have been unscaled and others not.
        """
        if scaler is None or not scaler.is_enabled():
            return LossScale(None, optimizers, None)
        states = grad_scaler.states(scaler)
        if grad_scaler.scale_of(scaler) is None and stage_device is not None:
            grad_scaler.start(scaler, stage_device)
        scale = grad_scaler.scale_of(scaler)
        if scale is None:
            raise ValueError(
                "the scaler passed to step() has never scaled a loss: call scaler.scale(loss).backward()"
            )
        stages = [states[id(o)]["stage"] if id(o) in states else OptState.READY for o in optimizers]
        if OptState.STEPPED in stages:
            raise ValueError(
                "scaler.step(), or clipper.step(..., update=False), has been called already for this "
                "optimizer since the scale was updated: clipper.step() takes the place of scaler.step(), so "
                "delete that line; and the last step of an iteration updates the scale"
            )
        if len(set(stages)) > 1:
            raise ValueError(
                "scaler.unscale_() was called for some of the optimizers and not for others: unscale all of "
                "them or none (step() does it on its own)"
            )
        unscaled = bool(stages) and stages[0] == OptState.UNSCALED
        return LossScale(scaler, optimizers, None if unscaled else reciprocal(scale))

    def finish(self, nonfinite: Tensor, *, update: bool = True) -> None:
        """All optimizers have been stepped: tell the scaler, and let it ``update`` its scale."""
        if self.scaler is not None:
            none: list[torch.optim.Optimizer | None] = [None]  # on a stage without parameters
            for optimizer in self.optimizers or none:
                record(self.scaler, optimizer, nonfinite, OptState.STEPPED)
            if update:
                self.scaler.update()


def told(scaler: GradScaler | None, optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """By what their gradients are still to be divided, in words; of a scaler on the CPU, for which nobody has
    to wait, with the number."""
    if scaler is None or not scaler.is_enabled():
        return "no loss scale"
    known = grad_scaler.states(scaler)
    if any(id(o) in known and known[id(o)]["stage"] is OptState.UNSCALED for o in optimizers):
        return "gradients that have been unscaled"
    if grad_scaler.device_of(scaler) != "cpu":
        return "a loss scale"
    scale = grad_scaler.scale_of(scaler)
    value = scaler.get_scale() if scale is None else look_at_one(scale)
    return "a loss scale" if value is None else f"loss scale {value:.6g}"


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in float32, rounded once."""
    return scale.double().reciprocal().float()


def record(
    scaler: GradScaler, optimizer: torch.optim.Optimizer | None, nonfinite: Tensor, stage: OptState
) -> None:
    """Tell the scaler whether infinities were found, as its own unscale_ would."""
    scale = grad_scaler.scale_of(scaler)
    assert scale is not None
    state = grad_scaler.states(scaler)[id(optimizer)]
    # update() adds the flags of several optimizers in place: each gets a tensor of its own.
    found = nonfinite.to(device=scale.device, dtype=torch.float32, copy=True)
    state["found_inf_per_device"] = {found.device: found}
    state["stage"] = stage
