"""What strategies may know of a parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParameterInfo:
    """What a strategy may know of a parameter: its name, its whole shape, its optimizer group (0 without),
    and how many rows it has (1 where it has one dim or none)."""

    name: str
    shape: torch.Size
    optimizer_group: int = 0
    units: int = 1
