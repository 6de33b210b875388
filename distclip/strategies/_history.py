"""The latest norms that a strategy has seen, kept on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distclip.strategies._base import state


class History(nn.Module):
    """A ring of the latest ``size`` norms. Its shape never changes, so it rolls back, saves and replays.

    A value that is not finite is not appended.
    """

    values: Tensor  # [size] float32, +inf where nothing has been written yet
    seen: Tensor  # [] int64, values appended so far

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("values", state((size,), math.inf, torch.float32))
        self.register_buffer("seen", state((), 0, torch.int64))

    @property
    def count(self) -> Tensor:
        """[] int64, how many values there are in the ring."""
        count: Tensor = self.seen.clamp(max=self.values.numel())
        return count

    def append(self, value: Tensor, where: Tensor) -> None:
        """``value`` [] float32, if it is finite and ``where``, [] bool, says so."""
        counts = torch.isfinite(value) & where
        position = (self.seen % self.values.numel()).view(1)
        self.values.scatter_(0, position, torch.where(counts, value, self.values.gather(0, position)))
        self.seen += counts

    def clear(self) -> None:
        self.values.fill_(math.inf)
        self.seen.zero_()

    def clear_where(self, where: Tensor) -> None:
        """Empty it if ``where``, [] bool, says so."""
        self.values.masked_fill_(where, math.inf)
        self.seen.masked_fill_(where, 0)

    def percentile(self, q: float) -> Tensor:
        """[] float32, the q-th percentile of what is positive, linear between neighbours as numpy's; NaN
        of an empty ring. (States that were saved by 0.1.0 have norms of 0 in the ring.)"""
        positive = torch.where(self.values > 0, self.values, math.inf)
        ordered = positive.sort().values  # what is not written yet comes last
        rank = (torch.isfinite(positive).sum() - 1).clamp(min=0).double() * (q / 100)
        neighbours = torch.stack((rank.floor(), rank.ceil())).long()
        low, high = ordered.gather(0, neighbours).double()
        interpolated: Tensor = low + (high - low) * rank.frac()
        return interpolated.float()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """[] float64 each, the deviation unbiased: NaN of fewer than one and two values."""
        present = torch.isfinite(self.values)
        values = torch.where(present, self.values, 0.0).double()
        mean = values.sum() / self.count
        deviations = torch.where(present, values - mean, 0.0)
        return mean, (deviations.square().sum() / (self.count - 1)).sqrt()


def teaches(norm: Tensor) -> Tensor:
    """[] bool, whether an adaptive strategy learns from it: a norm of 0 says that the step had no gradient (a
    batch without a signal, a frozen start), and a threshold learned from it would let no gradient through."""
    return torch.isfinite(norm) & (norm > 0)


def require_count(name: str, value: int, least: int = 1) -> int:
    """A number of steps as it is.

    Raises:
        ValueError: it is no integer, or less than ``least``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
    return value
