"""The backward pass that is running, and the versions that it leaves on tensors."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread is in; -1 outside of any. In 2.6 already."""

version = attrgetter("_version")
"""Of a tensor: how often autograd has seen it written to, in C. In 2.6 already. Inference tensors have none:
RuntimeError."""


def at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Have the backward pass that is running call this when its nodes are done, after callbacks that were
    queued before. Outside of one: RuntimeError. In 2.6 already (DDP and FSDP are built on it)."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(callback)
