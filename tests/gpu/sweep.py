"""Which block sizes of the Triton kernels are the fastest on this GPU: python -m tests.gpu.sweep

GB/s of Σg² and of the scaling of Llama's layers, in float32 and bfloat16, beside a plain read and a copy; the
values in ``distclip/kernels/triton.py`` are the first line.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from unittest.mock import patch

import torch

from distclip import kernels
from distclip.kernels import triton
from tests.gpu.test_triton import SIZES, milliseconds, randn

BLOCKS, WARPS, REPEATS, CHUNKS = (512, 1024, 2048, 4096), (4, 8), (1, 2, 4), (1024, 4096)


def rates(tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Of the sums and of the scaling."""
    triton._layouts.clear()
    total = sum(t.numel() * t.element_size() for t in tensors) / 1e6  # MB / ms = GB/s
    less = torch.full((), 0.999999, device="cuda")
    sums = milliseconds(partial(kernels.power_sums, tensors, 2.0, torch.float32))
    return total / sums, 2 * total / milliseconds(partial(kernels.scale_, tensors, less))


def main() -> None:
    assert kernels.goes_to_triton(torch.ones(1, device="cuda"))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = randn([n for n in SIZES for _ in range(4)], dtype)
        flat = torch.empty(sum(t.numel() * t.element_size() for t in tensors) // 4, device="cuda")
        read, copy = milliseconds(flat.amax), milliseconds(partial(torch.empty_like(flat).copy_, flat))
        megabytes = flat.numel() * 4 / 1e6
        print(f"{dtype}: {megabytes / read:.0f} GB/s read, {2 * megabytes / copy:.0f} copied")
        print("  block warps repeat chunks    sums   scale", flush=True)
        usual = (triton._BLOCK, triton._WARPS, triton._REPEAT, triton._CHUNKS)
        for block, warps, repeat, chunks in [usual, *product(BLOCKS, WARPS, REPEATS, CHUNKS)]:
            with patch.multiple(
                triton, _BLOCK=block, _WARPS=warps, _REPEAT=repeat, _CHUNKS=chunks, _SMALLEST=block * repeat
            ):
                sums, scale = rates(tensors)
            print(f"  {block:5} {warps:5} {repeat:6} {chunks:6} {sums:7.0f} {scale:7.0f}", flush=True)


if __name__ == "__main__":
    main()
