"""Clipping inside a function that ``torch.compile`` compiles, as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distclip
from distclip.torch_private.operators import LOSES_SCALARS
from tests import oracle
from tests.harness import on_ranks
from tests.layouts import LAYOUTS, Case
from tests.starting import TORCH

pytestmark = pytest.mark.skipif(TORCH < (2, 7), reason="Dynamo of torch 2.6 cannot trace dataclasses.replace")
STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "GlobalNorm": lambda: distclip.GlobalNorm(1.0),
    "PerParameter": lambda: distclip.PerParameter(0.5),
    "Value": lambda: distclip.Value(0.1),
    "Chain, Value first": lambda: distclip.Chain(distclip.Value(0.1), distclip.GlobalNorm(0.5)),
}


def compiled(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As one graph: whatever Dynamo cannot trace is an error."""
    torch._dynamo.reset()
    counters.clear()
    result: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    return result  # type: ignore[no-any-return]


def same_as_eager(case: Case, clip: Callable[[], Tensor]) -> float:
    """Compiled and eager on the same gradients; after a second look, no step is compiled again."""
    norms, gradients = [], []
    for run in (clip, compiled(clip)):
        for seed in (3, 4, 5, 6):
            case.backward(seed)
            before = case.dense()
            norms.append(run())
            gradients.append(case.dense())
            assert any(not torch.equal(g, before[n]) for n, g in gradients[-1].items())
    assert counters["stats"]["unique_graphs"] <= 2
    for eager, traced in zip(gradients[:4], gradients[4:], strict=True):
        for name in eager:
            torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.stack(norms[:4]), torch.stack(norms[4:]), rtol=1e-6, atol=0.0)
    return norms[-1].item()


def clip_with(case: Case, strategy: distclip.Strategy) -> Callable[[], Tensor]:
    clipper = distclip.Clipper(case.parameters, strategy)
    return lambda: clipper.clip().total_norm


@pytest.mark.parametrize("name", STRATEGIES)
def test_clipper(name: str) -> None:
    case = LAYOUTS["single"].build()
    same_as_eager(case, clip_with(case, STRATEGIES[name]()))


def test_state_that_torch_would_lose_is_an_error() -> None:
    """AOTAutograd drops changes of 0-dim float64 CPU inputs. ZClip's mean and variance are such."""
    mean, value = torch.zeros((), dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)

    def keep() -> None:  # and returns nothing: what is returned is kept
        mean.copy_(value)

    torch.compile(keep, backend="aot_eager")()
    assert bool(mean == 0.0) is LOSES_SCALARS, "since which release torch keeps them"
    case = LAYOUTS["single"].build()
    case.backward(3)
    clip = clip_with(case, distclip.ZClip())
    clip()
    if LOSES_SCALARS:
        # Dynamo of 2.8 says instead that there is an exception which it does not find a handler for.
        with pytest.raises(Exception, match=r"outside of torch\.compile|Observed exception"):
            compiled(clip)()
    else:
        compiled(clip)()


def test_drop_in() -> None:
    case = LAYOUTS["single"].build()
    same_as_eager(case, lambda: distclip.clip_grad_norm_(case.parameters, 1.0))


@pytest.mark.skipif(TORCH < (2, 9), reason="Dynamo of torch 2.8 recurses without end into DTensor")
@on_ranks(2)
def test_fsdp2(rank: int) -> list[float]:
    """Through a functional all-reduce; the shards are changed in place."""
    case = LAYOUTS["fsdp2_nested_uneven_empty"].build()
    clips = [clip_with(case, STRATEGIES[name]()) for name in ("GlobalNorm", "PerParameter")]
    clips.append(lambda: distclip.clip_grad_norm_(case.parameters, 1.0))
    return [same_as_eager(case, clip) for clip in clips]


@pytest.mark.skipif(TORCH < (2, 11), reason="Dynamo of torch 2.10 fails inside where a plan is made")
def test_without_fullgraph_a_plan_may_be_missing() -> None:
    model = nn.Linear(3, 2)
    clip = torch.compile(lambda: distclip.clip_grad_norm_(model, 1.0), backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        (model(torch.ones(4, 3)).sum() * 5).backward()
        want = oracle.norm(oracle.dense_gradients(model.parameters()))
        assert clip().item() == pytest.approx(want, rel=1e-6)
        assert oracle.norm(oracle.dense_gradients(model.parameters())) == pytest.approx(1.0, rel=1e-5)
