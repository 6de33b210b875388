"""Made-up trainings: the norms of usual steps, spikes, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._base import Strategy

PARAMETERS = tuple(
    ParameterInfo(
        name, torch.Size([4]) if "bias" in name else torch.Size([4, 4]), units=1 if "bias" in name else 4
    )
    for name in ("embed.weight", "0.weight", "0.bias", "1.weight", "1.bias", "head.weight")
)
_MOSTLY_USUAL = ("usual",) * 9 + ("spike", "one spike")
_EVERYTHING = ("usual", "usual", "usual", "spike", "one spike", "zero", "tiny", "huge", "nan", "inf")
_WHOLE = {"usual": 1.0, "spike": 30.0, "zero": 0.0, "tiny": 1e-40, "huge": 1e36}
_ONE = {"one spike": 1e4, "nan": math.nan, "inf": math.inf}


def histories(steps: int, seed: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Eight of them: a name, and [num_parameters] float64 for each step."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def drawn(kinds: Sequence[str]) -> list[str]:
        return [
            kinds[i] for i in torch.randint(len(kinds), (steps,), generator=generator, device="cpu").tolist()
        ]

    plans = {
        "usual norms and spikes": drawn(_MOSTLY_USUAL),
        "the same norm again and again": ["constant"] * (steps - 1) + ["spike"],
        **{
            f"{first} at first": [first, *drawn((*_MOSTLY_USUAL, first))[1:]]
            for first in ("zero", "tiny", "huge", "nan", "inf")
        },
        "everything": drawn(_EVERYTHING),
    }
    for name, kinds in plans.items():
        yield name, [_norms(kind, generator) for kind in kinds]


def _norms(kind: str, generator: torch.Generator) -> Tensor:
    if kind == "constant":
        return torch.full((len(PARAMETERS),), 0.2, dtype=torch.float64, device="cpu")
    norms = (0.3 * _drawn(generator) - 1.5).exp()
    one = torch.randint(len(PARAMETERS), (1,), generator=generator, device="cpu")
    if kind in _ONE:
        norms[one] *= _ONE[kind]
    return norms * _WHOLE.get(kind, 1.0)


def levels(steps: int, seed: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Trainings of finite norms whose level changes, with zeros and NaN between: a name, and
    [num_parameters] float64 for each step, ``steps`` usual ones and then 2 · ``steps`` others."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def usual(factor: float = 1.0, spread: float = 0.1) -> Tensor:
        return 0.2 * factor * (spread * _drawn(generator)).exp()

    before, after = range(steps), range(2 * steps)
    zero, nan = usual() * 0, usual() * math.nan
    for factor in (2.0, 10.0, 0.1):
        yield f"the level changes by {factor:g}", [usual() for _ in before] + [usual(factor) for _ in after]
    yield (
        "constant, then twice that, with zeros and NaN between",
        [usual(spread=0) for _ in before] + [(usual(2, 0), usual(2, 0), zero, nan)[i % 4] for i in after],
    )
    yield "a slow drift", [usual(1.02**i, 0.01) for i in range(3 * steps)]
    yield "frozen at first", [zero for _ in before] + [usual() for _ in after]
    yield "a third at 0", [zero if i % 3 == 2 else usual() for i in range(3 * steps)]
    yield "zeros from then on", [usual() for _ in before] + [zero for _ in after] + [usual()]


def _drawn(generator: torch.Generator) -> Tensor:
    return torch.randn(len(PARAMETERS), generator=generator, dtype=torch.float64, device="cpu")


def norms_for(strategy: Strategy, parts: Tensor) -> Norms:
    """What the clipper would hand to a strategy, of parameters with these norms, [num_parameters] float64."""
    labels: tuple[str, ...] = strategy.groups
    weights: Tensor | None = None
    if strategy.per_parameter:
        labels, of = tuple(p.name for p in PARAMETERS), list(range(len(PARAMETERS)))
    elif strategy.per_unit:
        shares = [part.expand(p.units) / p.units**0.5 for part, p in zip(parts, PARAMETERS, strict=True)]
        parts, labels = torch.cat(shares), ()
        of, weights = (
            list(range(len(parts))),
            torch.linspace(0, 40, len(parts), dtype=torch.float32, device="cpu"),
        )
    else:
        of = [strategy.group_of(p) for p in PARAMETERS]
    sums = torch.zeros(len(labels) or len(of), dtype=torch.float64, device="cpu")
    index = torch.tensor(of, dtype=torch.int64, device="cpu")
    if math.isinf(strategy.norm_type):  # the reduction sends a NaN as ∞
        sums.scatter_reduce_(0, index, parts.nan_to_num(nan=math.inf, posinf=math.inf), "amax")
    else:
        sums.index_add_(0, index, parts.pow(strategy.norm_type))
    extra = None
    if strategy.num_extra:
        one_each = [part.view(1).float() for part in parts]  # gradients of one element
        extra = torch.stack([strategy.elementwise(g) for g in one_each]).sum(0)
    loss = None
    if strategy.uses_loss:  # falls and jumps with the norm, and is NaN with it
        loss = parts.sum().log1p().float()
    norms = Norms.from_power_sums(sums, strategy.norm_type, labels)
    if strategy.measures_again:
        norms = replace(norms, clamped=partial(_clamped, parts, strategy.norm_type))
    return replace(norms, weights=weights, extra=extra, loss=loss)


def _clamped(parts: Tensor, p: float, coefficients: Tensor, bound: Tensor) -> Tensor:
    """Of gradients of one element each."""
    magnitudes = parts * coefficients
    clamped = magnitudes.clamp(max=bound.double())
    return torch.stack([clamped.pow(p).sum(), (magnitudes > bound).sum().double()])
