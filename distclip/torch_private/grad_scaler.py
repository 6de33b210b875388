"""What a ``torch.amp.GradScaler`` keeps: its scale, and of each optimizer what it has done since the last
update. In 2.6 already, all of it as used."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

States: TypeAlias = MutableMapping[int, dict[str, Any]]
"""By the id of an optimizer: ``stage``, an OptState, and ``found_inf_per_device``. Looking up makes one."""


def states(scaler: GradScaler) -> States:
    """The scaler's own dictionary (a defaultdict), until the next update, which replaces it."""
    return scaler._per_optimizer_states


def states_if_any(scaler: GradScaler | None) -> States | None:
    """Likewise; None without a scaler, and of one that has none (made for something else, or off)."""
    found: States | None = getattr(scaler, "_per_optimizer_states", None)
    return found


def set_states(scaler: GradScaler, states: States) -> None:
    """Put another dictionary in the place of its own, until the next update."""
    scaler._per_optimizer_states = states  # type: ignore[assignment]


def scale_of(scaler: GradScaler) -> Tensor | None:
    """[] or [1] float32, without waiting for it; None before it has scaled anything. (``get_scale()`` is a
    number, for which the host waits.)"""
    return scaler._scale


def set_scale(scaler: GradScaler, scale: Tensor | None) -> None:
    """Until the next update, which writes into it."""
    scaler._scale = scale


def start(scaler: GradScaler, device: torch.device) -> None:
    """Have a scaler that has scaled nothing make its scale there, as the first ``scale()`` would."""
    scaler._lazy_init_scale_growth_tracker(device)


def device_of(scaler: GradScaler) -> str:
    """The type of device that it was made for."""
    return scaler._device


def is_on(scaler: GradScaler) -> bool:
    """Whether it is enabled, whatever a subclass has put in the place of ``is_enabled()``."""
    return scaler._enabled
