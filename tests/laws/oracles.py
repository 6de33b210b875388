"""The adaptive strategies once more, from their formulae: lists, loops and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class PercentileOracle:
    percentile: float
    multiplier: float
    history: int
    warmup: int
    initial: float
    norms: list[float] = field(default_factory=list)

    def threshold(self, n: float) -> float:
        if n > 0:
            self.norms.append(n)
        if len(self.norms) < self.warmup:
            return self.initial
        return self.multiplier * float(np.percentile(np.array(self.norms[-self.history :]), self.percentile))


@dataclass
class SkipSpikesOracle:
    window: int
    sigma: float
    min_history: int
    patience: int
    norms: list[float] = field(default_factory=list)
    run: int = 0

    def skips(self, n: float) -> bool:
        previous = self.norms[-self.window :]
        skip = len(previous) + 1 >= self.min_history and (
            n - np.mean(previous) > self.sigma * np.std(previous, ddof=1)
        )
        if skip and self.run < self.patience:
            self.run += 1
            return True
        if skip:
            self.norms.clear()
        if n > 0:
            self.norms.append(n)
            self.run = 0
        return False


@dataclass
class ZClipOracle:
    alpha: float
    z_threshold: float
    max_norm: float
    warmup: int
    eps: float
    patience: int
    run: int = 0
    first: list[float] = field(default_factory=list)
    mean: float = math.nan
    variance: float = math.nan

    def coefficient(self, n: float) -> float:
        if n == 0:
            return 1.0
        if len(self.first) < self.warmup:
            self.first.append(n)
            if len(self.first) == self.warmup:
                self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return self.max_norm / (n + min(self.eps, n / 1000)) if n > self.max_norm else 1.0
        std = math.sqrt(self.variance)
        z = (n - self.mean) / (std + self.eps)
        fed, self.run = n, self.run + 1 if z > self.z_threshold else 0
        if z > self.z_threshold:
            fed = self.mean + self.z_threshold * std / (z / self.z_threshold)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * fed
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (fed - self.mean) ** 2
        if self.run == self.patience:
            self.first, self.run = [], 0
        effective = min(fed, self.max_norm)
        return effective / (n + min(self.eps, n / 1000)) if n > effective else 1.0


@dataclass
class AdaGCOracle:
    ratio: float
    beta: float
    eps: float
    warmup: int
    max_norm: float
    average: dict[int, float] = field(default_factory=dict)
    step: int = 0

    def coefficients(self, norms: Sequence[float]) -> list[float]:
        self.step += 1
        if self.step <= self.warmup:
            c = min(1.0, self.max_norm / (math.sqrt(sum(n * n for n in norms)) + self.eps))
            for i, n in enumerate(norms):
                if n > 0:
                    self.average[i] = min(self.average.get(i, math.inf), c * n)
            return [c] * len(norms)
        return [self._coefficient(i, n) for i, n in enumerate(norms)]

    def _coefficient(self, i: int, n: float) -> float:
        bound = self.ratio * self.average[i] if i in self.average else self.max_norm
        c = 1.0 if n <= bound else bound / (n + min(self.eps, n / 1000))
        if n > 0:
            kept = min(n, bound)
            self.average[i] = (
                self.beta * self.average[i] + (1 - self.beta) * kept if i in self.average else kept
            )
        return c
