"""Histories with a known right answer, and reports without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distclip.decide.report import ClipReport
from tests.counting import count_host_syncs

Floats = NDArray[np.float64]
LEVEL, SPREAD = 0.5, 0.2
P99 = LEVEL * math.exp(2.3263 * SPREAD)
"""The 99th percentile of the norms that :func:`stationary` draws."""


def stationary(steps: int = 4000, seed: int = 0) -> Floats:
    return LEVEL * np.exp(SPREAD * np.random.default_rng(seed).standard_normal(steps))


def drifting(factor: float, steps: int = 4000) -> Floats:
    return stationary(steps) * np.exp(np.linspace(0, math.log(factor), steps))


def spiky(factor: float, count: int, steps: int = 4000) -> tuple[Floats, list[int]]:
    """Norms, and the steps (from 1) of the spikes in them."""
    norms, at = stationary(steps), np.linspace(300, steps - 100, count).astype(int)
    norms[at] = LEVEL * factor
    return norms, (at + 1).tolist()


def warming_up(length: int, steps: int = 4000) -> Floats:
    """Ten times the norm at first, and as :func:`stationary` after ``length`` steps."""
    return stationary(steps) * np.exp(math.log(10) * np.clip(1 - np.arange(steps) / length, 0, 1))


def write(path: Path, norms: Floats, *, max_norm: float = 1.0, **head: object) -> Path:
    """A history of a run with ``GlobalNorm(max_norm)``."""
    names = {"distclip": '"0"', "format": "1", "world_size": "1", "norm_type": "2.0"}
    names |= {name: str(value) for name, value in head.items()}
    lines = ["{" + ",".join(f'"{name}":{value}' for name, value in names.items()) + "}"]
    for step, norm in enumerate(norms.tolist(), 1):
        shown = f"{norm:.9g}" if math.isfinite(norm) else f'"{norm}"'
        line = f'{{"step":{step},"total_norm":{shown},"threshold":{max_norm:g}'
        if norm > max_norm and math.isfinite(norm):
            line += f',"coefficient":{max_norm / norm:.9g},"clipped":true'
        lines.append(line + ("" if math.isfinite(norm) else ',"skipped":true,"nonfinite":true') + "}")
    path.write_text("\n".join(lines) + "\n")
    return path


def report(norm: float, *, max_norm: float = 1.0) -> ClipReport:
    total = torch.tensor(norm)
    coefficient = (max_norm / total).clamp(max=1.0).nan_to_num(nan=1.0)
    nonfinite = ~total.isfinite()
    return ClipReport(
        total_norm=total,
        clipped_norm=total * coefficient,
        coefficient=coefficient,
        threshold=torch.tensor(max_norm),
        clipped=coefficient < 1,
        nonfinite=nonfinite,
        skipped=nonfinite,
    )


@contextmanager
def counting_reads() -> Iterator[list[str]]:
    """How often the host reads a tensor: as ``count_host_syncs``, and ``tolist``, which that does not see."""
    reads: list[str] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> object:
        reads.append("tolist")
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch, count_host_syncs() as syncs:
        patch.setattr(torch.Tensor, "tolist", counted)
        yield reads
        reads.extend(["item"] * syncs.count)
