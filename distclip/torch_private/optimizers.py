"""What tells how an optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scales_and_skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step takes ``grad_scale`` and ``found_inf`` as tensors, by torch's own mark. In 2.6 already
    (``fused=True`` Adam, AdamW, SGD, Adagrad; some of them later); without the mark: no."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def has_step_hooks(optimizer: Any) -> bool:
    """Whether it can be given hooks around its step: torch's class has been initialised, which not every
    subclass does. In 2.6 already."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether ``torch.distributed.optim._apply_optimizer_in_backward`` has given it an optimizer. In 2.6
    already; torch leaves the (possibly empty) list in place for good."""
    return bool(getattr(parameter, "_in_backward_optimizers", None))
