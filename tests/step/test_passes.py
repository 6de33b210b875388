"""What a step costs beside torch's own sequence: passes over the gradients and host syncs, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.step.passes import CLIPS, DOES_NOT, Cost, cost_of, count_bytes, table

# (reads, writes) beside the fused optimizer, and host syncs. In place, the one sync is the free look at a CPU
# tensor, whether there is anything to multiply at all.
EXPECTED = {
    # who, with a scaler, clips
    ("torch", False, True): ((2, 1), 0),
    ("torch", False, False): ((2, 1), 0),  # multiplies by 1
    ("inplace", False, True): ((2, 1), 1),
    ("inplace", False, False): ((1, 0), 1),
    ("deferred", False, True): ((1, 0), 0),
    ("deferred", False, False): ((1, 0), 0),
    ("torch", True, True): ((3, 2), 0),
    ("torch", True, False): ((3, 2), 0),
    ("inplace", True, True): ((2, 1), 1),  # unscaling and clipping are one multiplication
    ("inplace", True, False): ((2, 1), 1),
    ("deferred", True, True): ((1, 0), 0),
    ("deferred", True, False): ((1, 0), 0),
}


@pytest.mark.parametrize(("who", "scaled", "clips"), EXPECTED)
def test_passes_and_syncs(who: str, scaled: bool, clips: bool) -> None:
    passes, syncs = EXPECTED[who, scaled, clips]
    cost = cost_of(who, scaled=scaled, fused=True, max_norm=CLIPS if clips else DOES_NOT)
    # Where a grad_scale is given, torch's kernel writes the gradient it has divided back.
    assert cost == Cost(passes, (1, 1) if who == "deferred" else (1, 0), syncs)


def test_the_counter_counts() -> None:
    net = nn.Linear(16, 16)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in net.parameters()]
    with count_bytes(net.parameters()) as passes:
        torch._foreach_norm(grads)
        grads[0].view(-1).mul_(2.0)  # 256 of 272 elements
        grads[1].zero_()
        torch.ones(5).add_(1)
        grads[0].detach().clone().mul_(3.0)
    assert passes.reads == {"_foreach_norm": 1.0, "mul_": 256 / 272, "clone": 256 / 272}
    assert passes.writes == {"mul_": 256 / 272, "zero_": 16 / 272}
    assert "distclip, deferred, GradScaler" in table()
