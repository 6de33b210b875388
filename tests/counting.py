"""Counting what a step costs, instead of timing it."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from distclip.testing._surroundings import waits


class count_host_syncs(TorchDispatchMode):
    """Counts what the host would wait for on a GPU: values (``.item()``, ``bool(t)``, ``float(t)``), and
    shapes that depend on values (masks, ``nonzero``, ``repeat_interleave``).

    Copies to and from a device cannot be seen on the CPU: for these see ``tests/device``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += waits(func, args)
        return func(*args, **(kwargs or {}))
