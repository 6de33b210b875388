"""Numbers on their way from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """A copy to the host that nobody waits for. What is on the CPU has arrived already."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)  # not to be read before it has arrived
        on_cpu = values.is_cpu
        self._left = None if on_cpu else torch.accelerator.current_stream(values.device).record_event()

    @property
    def arrived(self) -> bool:
        return self._left is None or bool(self._left.query())
