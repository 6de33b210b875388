"""What distclip takes for the same gradients on this rank, measured on copies: nobody has to join."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distclip.clipper import Clipper
from distclip.functional import total_grad_norm
from distclip.ownership import declare
from distclip.strategies import GlobalNorm
from distclip.torch_private.dtensor import local_of

_MOST = 1 << 28  # bytes of copies
_TIMES = 3


def seconds_of_distclip(tensors: Sequence[Tensor], max_norm: float, p: float) -> float | None:
    """A call of ``Clipper.clip`` with a plan that is made, the best of three; without its one collective.
    Where the gradients are too large to be copied, of ``total_grad_norm``, which writes to none of them. None
    where there are none, or ``max_norm`` is no threshold."""
    gradients = [local_of(t.grad).detach() for t in tensors if t.grad is not None]
    if max_norm <= 0 or not gradients or any(g.layout != torch.strided for g in gradients):
        return None
    copied = sum(g.nbytes for g in gradients) <= _MOST
    if copied:
        gradients = [g.clone() for g in gradients]
    holder = nn.Module()
    for i, g in enumerate(gradients):
        # As large as its gradient, in the memory of one element: nobody reads it.
        parameter = nn.Parameter(torch.zeros((), dtype=g.dtype, device=g.device).expand(g.shape))
        parameter.grad = g
        holder.register_parameter(str(i), parameter)
    declare(holder, local=True)
    call: Callable[[], object]
    if copied:
        call = Clipper(holder, GlobalNorm(max_norm, p), on_nonfinite="propagate").clip
    else:
        call = partial(total_grad_norm, holder, p)
    call()
    return min(_timed(call) for _ in range(_TIMES))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
