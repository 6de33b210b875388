from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from zclip import ZClip as PublicZClip

from distclip.decide.norms import Norms
from distclip.strategies import ZClip
from tests.parity.steps import agree, clip, model, spiky_gradients


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"max_norm": math.inf}, {"max_grad_norm": None}),
        (
            {"alpha": 0.8, "z_threshold": 1.2, "max_norm": 3.0, "warmup": 4},
            {"alpha": 0.8, "z_thresh": 1.2, "max_grad_norm": 3.0, "warmup_steps": 4},
        ),
    ],
    ids=["defaults", "z-score only", "other settings"],
)
def test_every_step_as_the_zclip_package(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    public, reference, strategy = PublicZClip(**theirs), model(), ZClip(**ours)
    touched = 0
    for (clipped, coefficient), gradients in zip(
        clip(strategy, spiky_gradients()), spiky_gradients(), strict=True
    ):
        for p, g in zip(reference.parameters(), gradients, strict=True):
            p.grad = g.clone()
        public.step(reference)
        assert agree(clipped, [p.grad for p in reference.parameters()])
        touched += coefficient.item() < 1
    assert 10 < touched < 300
    assert strategy.mean.item() == pytest.approx(public.mean, rel=1e-5)
    assert strategy.variance.item() == pytest.approx(public.var, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [10, 50])
def test_one_bad_norm_ends_the_zclip_package_but_not_ours(bad: float, when: int) -> None:
    """There it enters the averages, which stay NaN or infinite, so that no z-score is above a threshold
    again. Here a step that is not finite leaves no trace."""
    public, strategy = PublicZClip(max_grad_norm=None), ZClip(max_norm=math.inf)
    for step in range(200):
        n = bad if step == when else 1.0 + 0.1 * math.sin(step)
        if public.initialized:
            threshold = public._compute_clip_val(n)
            public._update_ema(n if threshold is None else threshold)
        else:
            public.buffer.append(n)
            if len(public.buffer) >= public.warmup_steps:
                public._initialize_ema()
        norm = torch.tensor(n)
        strategy.decide(Norms(norm, norm.view(1)))
    spike = torch.tensor(1e6)
    assert strategy.decide(Norms(spike, spike.view(1))).coefficient < 1e-5
    if math.isnan(bad) or when < public.warmup_steps:
        assert public._compute_clip_val(1e6) is None
    else:  # an infinity after the warm-up is a spike to both, and fed as one
        assert public._compute_clip_val(1e6) == pytest.approx(1.0, rel=0.2)
