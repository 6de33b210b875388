"""Fingerprints taken together are those taken one by one."""

from __future__ import annotations

import math

import torch

from distclip.planning.fingerprint import _TOGETHER, TOLERANCE, fingerprints

CPU = torch.device("cpu")


def test_together_as_alone() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(16, 16) for _ in range(_TOGETHER + 3)]  # of one size, more than fit in one go
    for other in (
        torch.randn(300, 40),
        torch.randn(300, 40).t(),  # not contiguous
        torch.randn(300, 40, dtype=torch.float64),
        torch.randn(40, 301),
        torch.randn(7, dtype=torch.complex64),
        torch.randn(256).bfloat16(),
        torch.randn(()),
        torch.zeros(3),
        torch.zeros(0),
        torch.tensor([1.0, math.inf]),
    ):
        tensors.insert(len(tensors) // 2, other)
    together = fingerprints(tensors, CPU)
    alone = torch.cat([fingerprints([tensor], CPU) for tensor in tensors])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12, equal_nan=True)
    assert together.isnan().any(dim=1).sum() == 1  # infinity is no evidence
    apart = (together[:_TOGETHER, None] - together[None, :_TOGETHER]).abs().amax(-1).fill_diagonal_(1)
    assert (apart.nan_to_num(1) > TOLERANCE).double().mean() > 0.999
