"""Numbers on their way between the host and a device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]: ``torch.tensor(values, device=device)`` waits for the device, this does not."""
    with to_keep():
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def bound_on(device: torch.device, bound: float) -> Tensor:
    """[] float32, or float64 where float32 does not hold it."""
    held = math.isinf(bound) or bound <= torch.finfo(torch.float32).max
    return torch.full((), bound, dtype=torch.float32 if held else torch.float64, device=device)


def to_keep() -> contextlib.AbstractContextManager[object]:
    """Around the making of a tensor that outlives the call: never one of ``torch.inference_mode()``, which
    could not be written to outside of it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


class Transfer:
    """A copy to the host that nobody waits for. What is on the CPU has arrived already."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)  # not to be read before it has arrived
        on_cpu = values.is_cpu
        self._left = None if on_cpu else torch.accelerator.current_stream(values.device).record_event()

    @property
    def arrived(self) -> bool:
        return self._left is None or bool(self._left.query())

    def wait(self) -> None:
        """Until it has arrived."""
        if self._left is not None:
            self._left.synchronize()
