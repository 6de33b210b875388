"""35, 40, 41, 46, 51 and 52 by way of the integrations: gradients that are not synchronised, scaled, or of
another scale, and strategies that are shared or made anew in each step."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.integrations import accelerate
from distclip.integrations.accelerate import install
from distclip.integrations.lightning import ClipGradients
from tests import oracle
from tests.faults.test_48_lightning import BATCHES, Automatic, Two, fit
from tests.harness import on_ranks
from tests.integrations.accelerators import Alone, Job, accelerator
from tests.integrations.test_lightning import pytestmark

__all__ = ["pytestmark"]

BOUND = 0.05

# --- 35 --------------------------------------------------------------------------------------------------


def whole(job: Job) -> Any:
    return job.model.parameters()


def part(job: Job) -> Any:
    return [p for name, p in job.model.named_parameters() if "first" in name]


def of_the_inner_module(job: Job) -> Any:
    return getattr(job.model, "module", job.model).parameters()


@pytest.mark.parametrize("how", ["norm", "value"])
@pytest.mark.parametrize("which", [whole, part, of_the_inner_module])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_35_the_scripts_own_no_sync(rank: int, kind: str, which: Any, how: str) -> None:
    with accelerator(kind) as a:
        job = Job(a, kind)
        install(a)
        clip = a.clip_grad_norm_ if how == "norm" else a.clip_grad_value_
        if kind == "fsdp2":
            job.model.set_requires_gradient_sync(False)
            job.backward(0)
            job.model.set_requires_gradient_sync(True)
        else:
            with job.model.no_sync():
                job.backward(0)
        words = r"synchronised|differs between ranks"
        with pytest.raises((ValueError, distclip.OwnershipError), match=words):
            clip(which(job), BOUND)
        job.optimizer.zero_grad()
        job.backward(1)
        clip(which(job), BOUND)
        alone = Alone()
        alone.backward(1)
        if how == "norm" and which is not part:
            assert a.clip_grad_norm_(which(job), math.inf).item() == pytest.approx(BOUND, rel=1e-4)
            assert alone.norm() > 4 * BOUND


@on_ranks(2)
def test_35_an_evaluation_without_sync_is_none(rank: int) -> None:
    """DDP remembers its last forward pass, whose gradients these are not."""
    with accelerator("ddp") as a:
        job = Job(a, "ddp")
        install(a)
        job.backward(0)
        with job.model.no_sync(), torch.no_grad():
            job.model(torch.ones(1, 8))
        a.clip_grad_value_(whole(job), 0.5)
        assert max(float(p.grad.abs().max()) for p in whole(job)) <= 0.5
        a.clip_grad_norm_(whole(job), BOUND)
        assert a.clip_grad_norm_(whole(job), math.inf).item() == pytest.approx(BOUND, rel=1e-4)


# --- 40, 41 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["norm", "value"])
def test_41_one_scale_for_the_gradients_of_a_pass(how: str) -> None:
    """Accelerate updates the scale with the step of the first, here in every step."""
    with accelerator("single", fp16=4.0) as a:
        a.scaler.set_growth_interval(1)
        models = [nn.Linear(4, 3), nn.Linear(4, 2)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
        models, optimizers = [a.prepare(m) for m in models], [a.prepare(o) for o in optimizers]
        install(a)
        for step in range(3):
            losses = [m(torch.full((1, 4), 1.0 + step)).float().sum() for m in models]
            a.backward(losses[0] + losses[1])
            for m, o in zip(models, optimizers, strict=True):
                scale = 4.0 * 4.0**step
                want = [p.grad.double() / scale for p in m.parameters()]
                if how == "value":
                    a.clip_grad_value_(m.parameters(), 1e3)
                    for p, w in zip(m.parameters(), want, strict=True):
                        torch.testing.assert_close(p.grad.double(), w)
                else:
                    norm = a.clip_grad_norm_(m.parameters(), BOUND)
                    assert norm.item() == pytest.approx(oracle.norm(want), rel=1e-5)
                    after = oracle.norm(oracle.dense_gradients(m.parameters()))
                    assert after == pytest.approx(BOUND, rel=1e-4)
                o.step()
            assert a.scaler.get_scale() == 4.0 * 4.0 ** (step + 1)
            for o in optimizers:
                o.zero_grad()


# --- 46 --------------------------------------------------------------------------------------------------


def test_46_scaled_by_the_script(caplog: pytest.LogCaptureFixture) -> None:
    """By a scaler of its own, of which Accelerate knows nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with accelerator("single") as a, caplog.at_level(logging.WARNING, "distclip"):
        job = Job(a, "single")
        install(a, distclip.GlobalNorm(1.0))
        for _ in range(40):
            a.backward(scaler.scale(job.model(torch.ones(1, 8)).square().sum()))
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            job.optimizer.step()
            job.optimizer.zero_grad()
    assert any("If a GradScaler scales the loss" in r.getMessage() for r in caplog.records)


# --- 51, 52 ----------------------------------------------------------------------------------------------


def test_51_one_strategy_object_for_two() -> None:
    strategy = distclip.Percentile()
    with accelerator("single") as a:
        job = Job(a, "single")
        install(a, strategy)
        job.backward(0)
        a.clip_grad_norm_(job.model.parameters(), 1.0)
        with pytest.raises(ValueError, match="this Percentile object has been used by another Clipper"):
            fit(Automatic(), ClipGradients(strategy))
    shared = distclip.ZClip()
    with pytest.raises(ValueError, match="this ZClip object has been used by another Clipper"):
        fit(Two(), ClipGradients([shared, shared]))


def test_51_one_strategy_after_the_other() -> None:
    """The next fit goes on with it."""
    clip = ClipGradients(distclip.Percentile())
    for _ in range(2):
        fit(Automatic(), clip)
    assert clip.clippers[0].steps == 2 * len(BATCHES)


def test_52_installed_anew_in_each_step(caplog: pytest.LogCaptureFixture) -> None:
    with accelerator("single") as a, caplog.at_level(logging.WARNING, "distclip"):
        job = Job(a, "single")
        for seed in range(6):
            job.backward(seed)
            with install(a, distclip.Percentile()):
                a.clip_grad_norm_(job.model.parameters(), 1.0)
            job.optimizer.step()
            job.optimizer.zero_grad()
        (said,) = [r.getMessage() for r in caplog.records if r.name == "distclip"]
        assert "Clippers in a row were made for the same parameters" in said
        install(a)
        with pytest.raises(ValueError, match="installed in this accelerator already"):
            install(a)


# --- pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp16", [None, 2.0**10], ids=["", "fp16"])
def test_an_accelerator_is_plain_after_removal(fp16: float | None) -> None:
    with accelerator("single", fp16=fp16) as a:
        job = Job(a, "single")
        before = set(vars(a)), set() if a.scaler is None else set(vars(a.scaler)), set(vars(job.optimizer))
        handle = install(a, distclip.ZClip())
        for seed in range(2):
            job.backward(seed)
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            job.optimizer.step()
            job.optimizer.zero_grad()
        handle.remove()
        handle.remove()
        after = set(vars(a)), set() if a.scaler is None else set(vars(a.scaler)), set(vars(job.optimizer))
        assert after == before
        again = pickle.loads(pickle.dumps(a))
        assert set(vars(again)) <= before[0]
        assert copy.deepcopy(a) is a  # Accelerate's own
        assert not a._save_model_state_pre_hook
        job.backward(0)
        a.clip_grad_norm_(job.model.parameters(), 1.0)
        job.optimizer.step()
        assert not job.optimizer.step_was_skipped
        accelerate.install(a, distclip.ZClip()).remove()
    assert not dist.is_initialized()
