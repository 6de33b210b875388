"""Take the optimizer's step, or skip it, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from distclip.torch_private.optimizers import scales_and_skips


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer scales and skips by itself: ``fused=True`` Adam, AdamW, SGD and, in newer
    releases of torch, Adagrad."""
    return scales_and_skips(optimizer)


def take_step(
    optimizer: torch.optim.Optimizer, skipped: Tensor, *, may_skip: bool, grad_scale: Tensor | None = None
) -> None:
    """``optimizer.step()`` unless ``skipped`` ([] bool).

    A fused optimizer gets the flag, and what to divide the gradients by, as tensors. Any other has to be
    left uncalled, for which the host must know the flag: the one host sync, and only where skipping is
    possible at all (``may_skip``).
    """
    fused = is_fused(optimizer)
    if type(skipped) is not Tensor and not fused:  # in a fake mode nothing is to be known, nor skipped
        may_skip = False
    if may_skip and (not fused or _lacks_momentum(optimizer)) and skipped.item():
        return
    if not fused:
        assert grad_scale is None
        optimizer.step()
        return
    optimizer.grad_scale = readable(optimizer, grad_scale)  # type: ignore[attr-defined]
    optimizer.found_inf = readable(optimizer, skipped.float())  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def readable(optimizer: torch.optim.Optimizer, value: Tensor | None) -> Tensor | None:
    """A flag or factor as a fused optimizer can take it. For parameters that are offloaded to the CPU torch
    copies it there without waiting, and reads what has not arrived: so it is brought there before."""
    if value is None or value.is_cpu or not any(map(attrgetter("is_cpu"), parameters_of(optimizer))):
        return value
    return value.cpu()


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is the first step of SGD with momentum. Its fused kernel is then given buffers of
    uninitialised memory to fill, which a step that it skips itself would leave in the state as they are."""
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    for group in optimizer.param_groups:
        first = next((p for p in group["params"] if p.grad is not None), None)
        filled = first is None or optimizer.state.get(first, {}).get("momentum_buffer") is not None
        if group["momentum"] and not filled:
            return True
    return False


def require_covered(optimizers: Sequence[torch.optim.Optimizer], tensors: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: an optimizer holds a parameter that the clipper does not: its gradient would be neither
            unscaled nor clipped, and an infinity in it not seen.
    """
    known = {id(t) for t in tensors}
    for optimizer in optimizers:
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise ValueError(
                        f"param_groups[{g}][{i}] of {type(optimizer).__name__} (shape "
                        f"{tuple(parameter.shape)}) is not among the clipper's parameters: make the Clipper "
                        "from the whole model or the optimizer. To clip only some of them, use "
                        "distclip.PerGroup with patterns; what fits none is left as it is."
                    )


def require_fused(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """
    Raises:
        ValueError: an optimizer cannot take the coefficient.
    """
    for optimizer in optimizers:
        if not is_fused(optimizer):
            raise ValueError(
                f'apply="deferred" hands the coefficient to the optimizer, which {type(optimizer).__name__} '
                "does not take: use Adam, AdamW, SGD (in newer releases of torch also Adagrad) with "
                'fused=True, or apply="inplace"'
            )
