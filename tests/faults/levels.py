"""Norms of a training whose level changes, and an optimizer-like look at what a strategy makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import distclip
from distclip.apply.change import parts
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo

BEFORE, AFTER = 80, 180


def noise(i: int) -> float:
    """Around 1, never the same twice."""
    return 1 + 0.05 * math.sin(i) + 0.03 * math.cos(1.7 * i)


def shift(factor: float, spread: float = 1.0) -> list[float]:
    return [(factor if i >= BEFORE else 1.0) * (1 + spread * (noise(i) - 1)) for i in range(BEFORE + AFTER)]


def every(n: int, other: float, norms: list[float]) -> list[float]:
    """Each n-th of them is ``other``."""
    return [other if i % n == n - 1 else norm for i, norm in enumerate(norms)]


FROM_THE_FIRST = [noise(i) for i in range(AFTER)]
SEQUENCES: dict[str, list[float]] = {
    "zeros in the whole warm-up": [0.0] * BEFORE + FROM_THE_FIRST,
    "one zero first": [0.0, *FROM_THE_FIRST],
    "a third at 0": every(3, 0.0, FROM_THE_FIRST),
    "one in five at 0": every(5, 0.0, FROM_THE_FIRST),
    "four in five at 0": [norm if i % 5 == 0 else 0.0 for i, norm in enumerate(FROM_THE_FIRST)],
    "zeros for a time": FROM_THE_FIRST[:BEFORE] + [0.0] * 200 + FROM_THE_FIRST,
    "zeros and NaN for a time": FROM_THE_FIRST[:BEFORE] + [0.0, math.nan] * 100 + FROM_THE_FIRST,
    "frozen start, tiny norms": [1e-12] * BEFORE + FROM_THE_FIRST,
    "twice": shift(2),
    "ten times": shift(10),
    "a thousand times": shift(1000),
    "a tenth": shift(0.1),
    "half, then twice": shift(0.5)[: BEFORE + 50] + shift(2)[BEFORE:],
    "twice, a third at 0": every(3, 0.0, shift(2)),
    "ten times, NaN between": every(4, math.nan, shift(10)),
    "ten times, infinities between": every(3, math.inf, shift(10)),
    "constant": [1.0] * (BEFORE + AFTER),
    "constant, then twice": shift(2, spread=0),
    "constant, then a little more": shift(1.001, spread=0),
    "constant, then a tenth": shift(0.1, spread=0),
    "twice, again and again": [2.0 ** (i // 100) * noise(i) for i in range(400)],
    "a slow drift up": [1.01**i * noise(i) for i in range(400)],
    "a slow drift down": [0.99**i * noise(i) for i in range(400)],
    "constant, then a slow drift": [1.0] * BEFORE + [1.005**i for i in range(AFTER)],
}


@dataclass(frozen=True)
class Row:
    """An adaptive strategy, and what its docstring states."""

    make: Callable[[], distclip.Strategy]
    patience: int = 0  # steps skipped in a row, at most
    learned_within: int | None = (
        None  # steps until a level is left alone; None: more than these sequences have
    )


ADAPTIVE: dict[str, Row] = {
    "ZClip": Row(lambda: distclip.ZClip(max_norm=math.inf), learned_within=125),
    "ZClip, short": Row(lambda: distclip.ZClip(0.9, 2.0, math.inf, warmup=5, patience=20), learned_within=25),
    "ZClip, max_norm": Row(lambda: distclip.ZClip(max_norm=1e-3)),
    "Percentile": Row(lambda: distclip.Percentile(history=200), learned_within=10),
    "Percentile(50)": Row(
        lambda: distclip.Percentile(50, multiplier=1.5, history=100, warmup=20), learned_within=50
    ),
    "Percentile(0)": Row(
        lambda: distclip.Percentile(0, multiplier=1.5, history=50, warmup=1), learned_within=50
    ),
    "AutoClip": Row(lambda: distclip.Percentile(10, multiplier=1, warmup=1, history=500)),
    "SkipSpikes": Row(lambda: distclip.SkipSpikes(), patience=10, learned_within=10),
    "SkipSpikes, short": Row(
        lambda: distclip.SkipSpikes(16, 3.0, min_history=5, patience=3), patience=3, learned_within=3
    ),
    "SkipSpikes, loss": Row(lambda: distclip.SkipSpikes(use_loss=True), patience=10, learned_within=10),
    "AdaGC": Row(lambda: distclip.AdaGC()),
    "AdaGC, quick": Row(lambda: distclip.AdaGC(2.0, 0.9, warmup=3, max_norm=10.0)),
    "AdaGC, no warm-up": Row(lambda: distclip.AdaGC(warmup=0)),
    "Chain(SkipSpikes, GlobalNorm)": Row(
        lambda: distclip.Chain(distclip.SkipSpikes(), distclip.GlobalNorm(0.5)), patience=10
    ),
    "Chain(ZClip, SkipSpikes)": Row(
        lambda: distclip.Chain(distclip.ZClip(max_norm=math.inf), distclip.SkipSpikes()), patience=10
    ),
    "Chain of two SkipSpikes": Row(
        lambda: distclip.Chain(
            distclip.SkipSpikes(patience=4), distclip.SkipSpikes(32, 3.0, min_history=20, patience=7)
        ),
        patience=7,
    ),
    "Chain(Value, SkipSpikes, Percentile)": Row(
        lambda: distclip.Chain(
            distclip.Value(1e12), distclip.SkipSpikes(), distclip.Percentile(50, warmup=5)
        ),
        patience=10,
    ),
    "Chain(AdaGC, Percentile)": Row(
        lambda: distclip.Chain(distclip.AdaGC(warmup=5), distclip.Percentile(50, warmup=5))
    ),
}


@dataclass(frozen=True)
class Taken:
    """What was left of one step's gradient."""

    norm: float
    left: float  # norm of the gradient afterwards
    coefficient: float
    skipped: bool


class Decisions:
    """What the strategy alone decides about norms, of two parameters with equal ones."""

    def __init__(self, strategy: distclip.Strategy) -> None:
        self.strategy, self.steps = strategy, 0
        strategy.prepare([ParameterInfo(name, torch.Size([2])) for name in "ab"])

    def step(self, norm: float) -> Taken:
        total = torch.tensor(norm)
        slots = (total / math.sqrt(2)).expand(2) if self.strategy.per_parameter else total.view(1)
        # One element each, in the chains that begin with a Value.
        extra = self.strategy.elementwise(slots) if self.strategy.num_extra else None
        loss = torch.tensor(1 + 0.01 * noise(self.steps))
        decision = self.strategy.decide(Norms(total, slots.clone(), extra=extra, loss=loss))
        scale, clamp = parts(decision)
        assert scale is not None
        left = total.double() * scale.coefficient.double().min()
        left = left if clamp is None else torch.minimum(left, clamp.bound.double())
        self.steps += 1
        skipped = decision.skip is not None and bool(decision.skip)
        return Taken(norm, left.item(), scale.coefficient.min().item(), skipped)


class Training:
    """Steps with gradients of given norms, over two parameters."""

    def __init__(self, strategy: distclip.Strategy, entrance: str = "clip") -> None:
        self.parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**30, backoff_factor=0.5, growth_interval=10**9
        )
        self.clipper = distclip.Clipper(self.parameters, strategy)
        self.entrance = entrance

    def step(self, norm: float) -> Taken:
        scale = self.scaler.get_scale() if self.entrance == "step, scaled" else 1.0
        for p in self.parameters:  # seven elements
            p.grad = torch.full_like(p, scale * norm / math.sqrt(7))
        loss = torch.tensor(1 + 0.01 * noise(int(self.clipper.steps)))
        if self.entrance == "clip":
            report = self.clipper.clip(loss=loss)
        elif self.entrance == "step":
            report = self.clipper.step(self.optimizer, loss=loss)
        else:
            self.scaler.scale(torch.zeros(()))  # as a training does
            report = self.clipper.step(self.optimizer, self.scaler, loss=loss)
        gradients = [p.grad.double() for p in self.parameters if p.grad is not None]
        left = math.sqrt(sum(g.square().sum().item() for g in gradients))
        return Taken(norm, left, report.coefficient.item(), bool(report.skipped))


def longest_run_of_skips(steps: list[Taken]) -> int:
    """Of those with a norm that is a positive number."""
    longest = run = 0
    for step in steps:
        if math.isfinite(step.norm) and step.norm > 0:
            run = run + 1 if step.skipped else 0
            longest = max(longest, run)
    return longest
