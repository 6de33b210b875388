"""What DistributedDataParallel knows of the gradients that it averages. In 2.6 already, all of it as used."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def averaged_parameters(model: DistributedDataParallel) -> list[nn.Parameter]:
    """Those that it averages the gradients of, as it found them when it was made. (Not among them: what its
    ``delay_all_reduce_named_params`` names, and what it was told to ignore.)"""
    return model._module_parameters


def comm_hooks(model: DistributedDataParallel) -> list[tuple[Any, Any]]:
    """Its own list of the communication hooks that it was given, each with its state. It notes one before the
    reducer may refuse it: who is refused takes it away again."""
    return model._comm_hooks


def delays_all_reduce(model: DistributedDataParallel) -> bool:
    """Whether it was made with ``delay_all_reduce_named_params``; where it does not say, not."""
    return bool(getattr(model, "_delay_all_reduce_params", None))


def lets_ranks_be_absent(model: DistributedDataParallel) -> bool:
    """Whether torch's ``Join`` has told it that ranks may run out of batches, which stays after its ``with``
    block; where it does not say, not."""
    config = getattr(model, "_join_config", None)
    return config is not None and bool(config.enable and not config.throw_on_early_termination)


def synchronises(model: DistributedDataParallel) -> bool:
    """Whether its last forward pass has asked for the gradients to be averaged; an evaluation asks too."""
    return bool(model.require_forward_param_sync)


def awaits_finalization(model: DistributedDataParallel) -> bool:
    """Whether a backward pass waits for ``finalize_backward()``: since 2.15, where
    ``require_manual_backward_finalization`` is set; before, no."""
    if not getattr(model, "require_manual_backward_finalization", False):
        return False
    try:
        model._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return False


def backward_times(model: DistributedDataParallel) -> list[int]:
    """When, in the last backward pass that it averaged, which gradient was there, from the first on; [] where
    it has no reducer (any more)."""
    return list(model.reducer.get_backward_stats()) if hasattr(model, "reducer") else []
