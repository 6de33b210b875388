"""Numbers on their way between the host and a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]: ``torch.tensor(values, device=device)`` waits for the device, this does not."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


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
