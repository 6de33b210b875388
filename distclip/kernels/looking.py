"""Looking at numbers in the CPU's memory, where that waits for nothing.

``.item()`` and ``.tolist()`` read wherever a tensor lies, and on an accelerator they wait for it. What is
read here is read in place, or not at all.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def look(numbers: Tensor) -> list[float] | None:
    """The values of a float64 tensor in order; None where the host cannot know them without waiting, or at
    all: on an accelerator, and in what ``torch.compile`` or a fake mode traces."""
    if torch.compiler.is_compiling() or type(numbers) is not Tensor or not numbers.is_cpu:
        return None
    assert numbers.dtype == torch.float64
    assert numbers.is_contiguous()
    count = numbers.numel()
    if count == 1:
        return [ctypes.c_double.from_address(numbers.data_ptr()).value]
    return list((ctypes.c_double * count).from_address(numbers.data_ptr())) if count else []


def look_at_one(number: Tensor) -> float | None:
    """The same of one number, of any float dtype."""
    found = look(number.detach().double())
    return None if found is None else found[0]
