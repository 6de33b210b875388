"""Failure 50: what torch is set to changes no bit of what a strategy decides, nor of what it keeps."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import distclip
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.testing import check_strategy
from tests.faults.levels import noise

STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "GlobalNorm": lambda: distclip.GlobalNorm(0.7),
    "GlobalNorm, no limit": lambda: distclip.GlobalNorm(math.inf),
    "GlobalNorm, p = ∞": lambda: distclip.GlobalNorm(0.3, math.inf),
    "GlobalNorm, Warmup": lambda: distclip.GlobalNorm(distclip.Warmup(0.1, 1.0, steps=7)),
    "PerParameter": lambda: distclip.PerParameter(0.3),
    "PerParameter, Cosine": lambda: distclip.PerParameter(distclip.Cosine(1.0, 0.1, steps=7)),
    "PerGroup": lambda: distclip.PerGroup({"*.bias": 0.1, "0.*": 0.3}),
    "Value": lambda: distclip.Value(0.1),
    "Value, direction": lambda: distclip.Value(0.1, measure_direction=True),
    "Percentile": lambda: distclip.Percentile(50, multiplier=1.1, history=9, warmup=3, initial=0.5),
    "AutoClip": lambda: distclip.Percentile(10, multiplier=1, warmup=1, history=None),
    "ZClip": lambda: distclip.ZClip(warmup=4, max_norm=2.0, patience=3),
    "SkipSpikes": lambda: distclip.SkipSpikes(8, 3.0, min_history=4, patience=2),
    "SkipSpikes, loss": lambda: distclip.SkipSpikes(8, 3.0, min_history=4, patience=2, use_loss=True),
    "AdaGC": lambda: distclip.AdaGC(warmup=3),
    "AGC": lambda: distclip.AGC(0.01, exclude="*.bias"),
    "Chain": lambda: distclip.Chain(
        distclip.SkipSpikes(8, 3.0, min_history=4),
        distclip.PerGroup({"*.bias": 0.1}),
        distclip.AdaGC(warmup=3),
        distclip.ZClip(warmup=4),
        distclip.Value(0.1),
    ),
    "Chain, Value first": lambda: distclip.Chain(
        distclip.Value(0.2), distclip.Percentile(50, warmup=3), distclip.GlobalNorm(0.3)
    ),
}
PARAMETERS = [ParameterInfo(name, torch.Size([2, 3]), units=2) for name in ("0.weight", "0.bias", "1.weight")]
NORMS = [0.4 * noise(i) * (30.0 if i % 11 == 9 else 1.0) for i in range(23)] + [
    0.0,
    math.nan,
    0.4,
    math.inf,
    0.4,
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "grad on": torch.enable_grad,
    "no grad": torch.no_grad,
    "function mode": Passing,
}


def norms_of(strategy: distclip.Strategy, norm: float, i: int) -> Norms:
    """Made outside of any setting: the strategy is what is tried."""
    size = 3 if strategy.per_parameter else 6 if strategy.per_unit else len(strategy.groups)
    shares = torch.linspace(1, 2, size, dtype=torch.float32, device="cpu")
    slots = norm * shares / shares.norm()
    total = torch.tensor(norm, dtype=torch.float32, device="cpu")
    weights = torch.linspace(0, 3, size, dtype=torch.float32, device="cpu") if strategy.per_unit else None
    loss = torch.tensor(2 * noise(i), dtype=torch.float32, device="cpu") if strategy.uses_loss else None
    return Norms(total, slots, strategy.norm_type, weights=weights, loss=loss)


def gradient(norm: float) -> Tensor:
    return torch.linspace(-1, 1, 8, dtype=torch.float32, device="cpu") * norm


class Course:
    """A strategy from its making to its last step, with everything it decided on the way."""

    def __init__(self, name: str) -> None:
        self.strategy = STRATEGIES[name]()
        self.strategy.prepare(PARAMETERS)
        self.said: list[Tensor] = []

    def go(self, steps: range, inputs: list[tuple[Norms, Tensor]]) -> None:
        for i in steps:
            norms, g = inputs[i]
            if self.strategy.num_extra:
                norms = Norms(
                    norms.total,
                    norms.slots,
                    norms.norm_type,
                    extra=self.strategy.elementwise(g),
                    loss=norms.loss,
                )
            decision = self.strategy.decide(norms)
            parts = [getattr(decision, "first", decision), getattr(decision, "second", None)]
            for part in parts:
                for field in ("coefficient", "threshold", "bound", "skip", "clipped_norm", "direction"):
                    value = getattr(part, field, None)
                    if value is not None:
                        self.said.append(value.clone())

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.strategy.named_buffers())


def same(a: Tensor, b: Tensor) -> bool:
    alike = (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
    return alike and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_50_equal_to_the_bit(name: str, setting: str) -> None:
    """Made, prepared and run under the setting; and the last steps outside of it again."""
    usual = Course(name)
    inputs = [(norms_of(usual.strategy, norm, i), gradient(norm)) for i, norm in enumerate(NORMS)]
    first, last = range(len(NORMS) - 6), range(len(NORMS) - 6, len(NORMS))
    usual.go(first, inputs)
    usual.go(last, inputs)
    with SETTINGS[setting]():
        other = Course(name)
        other.go(first, inputs)
        reloaded = Course(name)
        file = io.BytesIO()
        torch.save(other.strategy.state_dict(), file)
        reloaded.strategy.load_state_dict(torch.load(io.BytesIO(file.getvalue()), map_location="cpu"))
    other.go(last, inputs)
    reloaded.go(last, inputs)
    assert len(usual.said) == len(other.said)
    for a, b in zip(usual.said, other.said, strict=True):
        assert same(a, b), (a, b)
    assert usual.state.keys() == other.state.keys()
    for key, value in usual.state.items():
        assert same(value, other.state[key]), key
        assert same(value, reloaded.state[key]), key
        assert value.dtype in (torch.float32, torch.float64, torch.int64, torch.bool)
    assert any(bool((value != 1).any()) for value in usual.said)


@pytest.mark.parametrize("setting", ["bfloat16", "float16", "float64", "device meta", "inference"])
def test_50_check_strategy(setting: str) -> None:
    with SETTINGS[setting]():
        check_strategy(lambda: distclip.ZClip(warmup=5), steps=12)
