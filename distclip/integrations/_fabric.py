"""The optimizer step of Lightning's Fabric, taken by a clipper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distclip.clipper import Clipper
from distclip.decide.report import ClipReport


def step(fabric: Any, clipper: Clipper, optimizer: Any, *, loss: Tensor | float | None = None) -> ClipReport:
    """With Fabric, in place of ``fabric.clip_gradients(model, optimizer, …)`` and ``optimizer.step()``.

    Unscales, clips, steps or skips, and updates the loss scale, alike on every rank: also for FSDP, FSDP2 and
    tensor parallel models, and for fused optimizers with ``precision="16-mixed"``, where
    ``fabric.clip_gradients`` raises.

    Args:
        fabric: that has set up the model and the optimizer.
        clipper: made from the model that ``fabric.setup`` has returned.
        optimizer: as ``fabric.setup`` has returned it.
        loss: as for :meth:`distclip.Clipper.step`.

    Raises:
        TypeError: under DeepSpeed, whose engine clips by its own configuration.

    Example:
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
        >>> fabric.backward(loss)
        >>> report = step(fabric, clipper, optimizer)
        >>> optimizer.zero_grad()
    """
    if "DeepSpeed" in type(fabric.strategy).__name__:
        raise TypeError("DeepSpeed's engine clips by its own configuration: set gradient_clipping there")
    inner = getattr(optimizer, "optimizer", optimizer)
    report = clipper.step(inner, getattr(fabric.strategy.precision, "scaler", None), loss=loss)
    fabric.call("on_after_optimizer_step", strategy=fabric.strategy, optimizer=inner)
    return report
