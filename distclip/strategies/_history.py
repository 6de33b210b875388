"""The latest norms that a strategy has seen, kept on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class History(nn.Module):
    """A ring of the latest ``size`` norms. Its shape never changes, so it rolls back, saves and replays.

    A norm that is not finite is not appended.
    """

    values: Tensor  # [size] float32, +inf where nothing has been written yet
    seen: Tensor  # [] int64, norms appended so far

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.full((size,), math.inf))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def count(self) -> Tensor:
        """[] int64, how many norms there are in the ring."""
        count: Tensor = self.seen.clamp(max=self.values.numel())
        return count

    def append(self, norm: Tensor) -> None:
        finite = torch.isfinite(norm)
        position = (self.seen % self.values.numel()).view(1)
        self.values.scatter_(0, position, torch.where(finite, norm, self.values.gather(0, position)))
        self.seen += finite

    def clear(self) -> None:
        self.values.fill_(math.inf)
        self.seen.zero_()

    def percentile(self, q: float) -> Tensor:
        """[] float32, the q-th percentile, linear between neighbours as numpy's; NaN of an empty ring."""
        ordered = self.values.sort().values  # what is not written yet comes last
        rank = (self.count - 1).clamp(min=0).double() * (q / 100)
        neighbours = torch.stack((rank.floor(), rank.ceil())).long()
        low, high = ordered.gather(0, neighbours).double()
        interpolated: Tensor = low + (high - low) * rank.frac()
        return interpolated.float()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """[] float64 each, the deviation unbiased: NaN of fewer than one and two norms."""
        present = torch.isfinite(self.values)
        values = torch.where(present, self.values, 0.0).double()
        mean = values.sum() / self.count
        deviations = torch.where(present, values - mean, 0.0)
        return mean, (deviations.square().sum() / (self.count - 1)).sqrt()


def require_count(name: str, value: int, least: int = 1) -> int:
    """A number of steps as it is.

    Raises:
        ValueError: it is no integer, or less than ``least``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
    return value
