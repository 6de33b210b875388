"""The ways to clip, so that each fault is tried by all of them, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip.integrations.accelerate import install
from tests import oracle
from tests.integrations.accelerators import accelerator

BOUND = 1e-3  # far below any gradient of these tests
ALL = ("clip", "clip, overlap", "step", "step, overlap", "function", "list", "accelerate")
CLIPPERS = ("clip", "clip, overlap", "step", "step, overlap")
WITHOUT_OVERLAP = ("clip", "step", "function", "list", "accelerate")


class Way:
    """Clips a model in one way, step after step, whatever happens to the model in between.

    ``function`` and ``accelerate`` get the parameters anew in each step, as their users pass them; the rest
    keep the module. Accelerate's model is registered as it is: what wraps it is the test's.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        strategy: distclip.Strategy | None = None,
        *,
        source: Any = None,
        accelerator: Any = None,
        **kwargs: Any,
    ) -> None:
        self.name, self.model, self.accelerator, self.kwargs = name, model, accelerator, kwargs
        self.clipper: distclip.Clipper | None = None
        self.source = model if source is None else source
        if name.startswith(("clip", "step")):
            strategy = strategy or distclip.GlobalNorm(BOUND)
            self.clipper = distclip.Clipper(self.source, strategy, overlap="overlap" in name, **kwargs)
        if accelerator is not None:
            install(accelerator, strategy, **kwargs)
            accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def __call__(self) -> Tensor:
        if self.name.startswith("clip"):
            assert self.clipper is not None
            return self.clipper.clip().total_norm
        if self.name.startswith("step"):
            assert self.clipper is not None
            if isinstance(self.source, torch.optim.Optimizer):
                return self.clipper.step(self.source).total_norm
            parameters = [p for p in _parameters(self.source) if p.requires_grad or p.grad is not None]
            return self.clipper.step(torch.optim.SGD(parameters, lr=0.0)).total_norm
        if self.name == "function":
            return distclip.clip_grad_norm_(self.source, BOUND, **self.kwargs)
        if self.name == "list":
            return distclip.clip_grad_norm_(list(_parameters(self.source)), BOUND, **self.kwargs)
        norm: Tensor = self.accelerator.clip_grad_norm_(list(_parameters(self.source)), BOUND)
        return norm


def _parameters(source: Any) -> list[Tensor]:
    if isinstance(source, nn.Module):
        return list(source.parameters())
    if isinstance(source, torch.optim.Optimizer):
        return [p for group in source.param_groups for p in group["params"]]
    if isinstance(source, Tensor):
        return [source]
    found = []
    for item in source:
        found += (
            list(item.parameters())
            if isinstance(item, nn.Module)
            else [item[1] if isinstance(item, tuple) else item]
        )
    return found


@contextmanager
def clipping(
    name: str, model: Any, strategy: distclip.Strategy | None = None, **kwargs: Any
) -> Iterator[Way]:
    with ExitStack() as stack:
        a = None
        if name == "accelerate":
            a = stack.enter_context(accelerator("ddp" if dist.is_initialized() else "single"))
        yield Way(name, model, strategy, accelerator=a, **kwargs)


def fill(model: nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    """Known gradients through a real backward pass, whatever the model computes: alike on all ranks."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    loss: Any = 0.0
    for p in model.parameters():
        if p.requires_grad:
            slope = scale * (0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
            loss = loss + (p * slope).sum().double()
    loss.backward()


def assert_right(
    way: Callable[[], Tensor],
    model: Any,
    dense: Callable[[], Sequence[Tensor | None]] | None = None,
    bound: float = BOUND,
) -> None:
    """The norm is the float64 norm of the gathered gradient, and clipping brings it to ``bound``."""
    gather = dense or (lambda: oracle.dense_gradients({id(p): p for p in _parameters(model)}.values()))
    low_precision = any(p.dtype == torch.bfloat16 for p in _parameters(model))
    before = [g for g in gather() if g is not None]
    want = oracle.norm(before)
    assert want > 4 * bound, "nothing to clip"
    got = way()
    assert type(got) is Tensor
    assert (got.dtype, got.dim()) == (torch.float32, 0)
    assert got.item() == pytest.approx(want, rel=1e-5)
    after = [g for g in gather() if g is not None]
    for b, a in zip(before, after, strict=True):
        rounding = 1e-2 if low_precision else 1e-4
        torch.testing.assert_close(a, b * (bound / (want + 1e-6)), rtol=rounding, atol=1e-9)


def raised(way: Callable[[], Any]) -> str:
    """The kind of error, or "" where there was none."""
    try:
        way()
    except Exception as error:
        return type(error).__name__
    return ""
