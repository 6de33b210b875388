"""Gradients of a small model over many steps, most of them usual and some of them far too large."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import distclip
from distclip.strategies import Strategy

STEPS = 320


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def spiky_gradients(seed: int = 0) -> Iterator[list[Tensor]]:
    """For each step one gradient for each parameter of ``model()``; norms around 0.3, spikes up to 100."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in model().parameters()]
    for step in range(STEPS):
        level = 0.05 * (1 + 0.3 * torch.rand((), generator=generator))
        spike = 10.0 ** (2.5 * torch.rand((), generator=generator)) if step % 7 == 6 else 1.0
        yield [level * spike * torch.randn(shape, generator=generator) for shape in shapes]


def clip(strategy: Strategy, steps: Iterator[list[Tensor]]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What the clipper makes of each step, and by how much it scaled."""
    parameters = model()
    clipper = distclip.Clipper(parameters, strategy)
    for gradients in steps:
        for p, g in zip(parameters.parameters(), gradients, strict=True):
            p.grad = g.clone()
        report = clipper.clip()
        yield [p.grad for p in parameters.parameters()], report.coefficient


def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=0.0) for a, b in zip(ours, theirs, strict=True))
