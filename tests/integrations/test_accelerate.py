"""Accelerate's own run and the same with distclip, side by side; and where Accelerate is wrong or refuses.

What stands for a GPU here is said in ``tests/integrations/accelerators.py``. Every right answer is that of one
process in float64, on the batch of all ranks.
"""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distclip
from distclip.integrations.accelerate import Installed, install
from tests.harness import on_ranks
from tests.integrations.accelerators import MAX_NORM, Alone, Job, accelerator, plain

LARGE = 1e9  # a max_norm that clips nothing


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rel, atol=rel, msg=lambda m, n=name: f"{n}: {m}")


def is_plain(norm: Any) -> bool:
    return type(norm) is Tensor and norm.dtype == torch.float32 and norm.dim() == 0


# --- side by side ---------------------------------------------------------------------------------------


def train(kind: str, with_distclip: bool, p: float = 2.0) -> tuple[list[float], dict[str, Tensor]]:
    with accelerator(kind) as a:
        job, norms = Job(a, kind), []
        if with_distclip:
            install(a)
        for seed in range(3):
            job.backward(seed)
            norm = a.clip_grad_norm_(job.model.parameters(), MAX_NORM, p)
            assert is_plain(norm) or not with_distclip
            norms.append(plain(norm))
            job.optimizer.step()
            job.optimizer.zero_grad()
        return norms, job.whole()


def side_by_side(kind: str, p: float = 2.0) -> list[float]:
    theirs, their_weights = train(kind, False, p)
    mine, my_weights = train(kind, True, p)
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert min(mine) > 4 * MAX_NORM  # so it clips
    assert_equal(my_weights, their_weights)
    alone = Alone()
    for seed, norm in enumerate(mine):
        alone.backward(seed)
        assert norm == pytest.approx(alone.norm(p), rel=1e-5)
        coefficient = MAX_NORM / (alone.norm(p) + 1e-6)
        for parameter in alone.model.parameters():
            parameter.grad *= coefficient  # type: ignore[operator]
        alone.step()
    assert_equal(my_weights, alone.whole())
    return mine


@pytest.mark.parametrize("p", [2.0, 1.0])
def test_single_process(p: float) -> None:
    side_by_side("single", p)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "tp"])
@on_ranks(2)
def test_two_ranks(rank: int, kind: str) -> list[float]:
    return side_by_side(kind)


@pytest.mark.parametrize("kind", ["hsdp", "fsdp2_tp"])
@on_ranks(4)
def test_four_ranks(rank: int, kind: str) -> list[float]:
    return side_by_side(kind)
