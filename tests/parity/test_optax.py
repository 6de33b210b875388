from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import Tensor

from distclip.strategies import AGC, Chain, GlobalNorm, PerGroup, Strategy, Value
from tests.parity.steps import STEPS, agree, clip, model, spiky_gradients


def update(transform: Any, gradients: list[Tensor], parameters: list[Tensor] | None = None) -> list[Tensor]:
    arrays, weights = ([jnp.asarray(t.detach().numpy()) for t in ts or ()] for ts in (gradients, parameters))
    updates, _ = transform.update(arrays, transform.init(arrays), weights or None)
    return [torch.from_numpy(np.array(u)) for u in updates]


@pytest.mark.parametrize(
    ("strategy", "transform"),
    [
        (GlobalNorm(0.5, eps=0), optax.clip_by_global_norm(0.5)),
        (Value(0.1), optax.clip(0.1)),
        (
            Chain(GlobalNorm(2.0, eps=0), GlobalNorm(0.5, eps=0)),
            optax.chain(optax.clip_by_global_norm(2.0), optax.clip_by_global_norm(0.5)),
        ),
        (
            Chain(GlobalNorm(0.5, eps=0), Value(0.1)),
            optax.chain(optax.clip_by_global_norm(0.5), optax.clip(0.1)),
        ),
        (
            Chain(Value(0.1), GlobalNorm(0.3, eps=0)),
            optax.chain(optax.clip(0.1), optax.clip_by_global_norm(0.3)),
        ),
        (
            Chain(Value(0.5), Value(0.1), GlobalNorm(0.3, eps=0), GlobalNorm(0.2, eps=0), Value(0.02)),
            optax.chain(optax.clip(0.1), optax.clip_by_global_norm(0.2), optax.clip(0.02)),
        ),
        (
            Chain(GlobalNorm(0.5, eps=0), Value(0.1), GlobalNorm(0.2, eps=0)),
            optax.chain(optax.clip_by_global_norm(0.5), optax.clip(0.1), optax.clip_by_global_norm(0.2)),
        ),
    ],
    ids=[
        "clip_by_global_norm",
        "clip",
        "chain",
        "chain that clamps",
        "clamps first",
        "clamps at both ends",
        "clamps in the middle",
    ],
)
def test_every_step_as_optax(strategy: Strategy, transform: Any) -> None:
    touched = 0
    for (clipped, _), gradients in zip(clip(strategy, spiky_gradients()), spiky_gradients(), strict=True):
        assert agree(clipped, update(transform, gradients))
        touched += not all(map(torch.equal, clipped, gradients))
    assert 30 < touched <= STEPS


def test_every_step_as_clip_by_block_rms() -> None:
    """Its threshold is on the root of the mean square: of n elements, 1/√n of the norm."""
    limits = {name: 0.1 * math.sqrt(p.numel()) for name, p in model().named_parameters()}
    transform, touched = optax.clip_by_block_rms(0.1), 0
    strategy = PerGroup(limits, eps=0)
    for (clipped, _), gradients in zip(clip(strategy, spiky_gradients()), spiky_gradients(), strict=True):
        assert agree(clipped, update(transform, gradients))
        touched += not all(map(torch.equal, clipped, gradients))
    assert 30 < touched < STEPS


@pytest.mark.parametrize("clipping", [0.1, 1.0])
def test_every_step_as_adaptive_grad_clip(clipping: float) -> None:
    """A unit there is a column: its linear layers are [in, out]."""
    transform, weights, touched = optax.adaptive_grad_clip(clipping, 1e-3), list(model().parameters()), 0
    strategy = AGC(clipping, eps=1e-3, exclude=())
    for (clipped, _), gradients in zip(clip(strategy, spiky_gradients()), spiky_gradients(), strict=True):
        theirs = update(transform, *([t.T if t.dim() > 1 else t for t in ts] for ts in (gradients, weights)))
        assert agree(clipped, [t.T if t.dim() > 1 else t for t in theirs])
        touched += not all(map(torch.equal, clipped, gradients))
    assert 30 < touched <= STEPS


def test_one_nan_makes_every_gradient_nan_in_optax_but_not_here() -> None:
    """It multiplies all by 1 / NaN. Here the step is reported as non-finite and nothing is touched."""
    gradients = next(spiky_gradients())
    gradients[0][0, 0] = math.nan
    theirs = update(optax.clip_by_global_norm(0.5), gradients)
    assert all(g.isnan().all() for g in theirs)
    ((ours, _),) = clip(GlobalNorm(0.5, eps=0), iter([gradients]))
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(ours, gradients, strict=True)
    )
