"""Checkpoints of the three frameworks: saved with distclip and loaded without, the other way round, and with
another strategy than they were saved with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import distclip
from distclip.integrations import accelerate, transformers
from distclip.integrations.lightning import ClipGradients
from tests.harness import on_ranks
from tests.integrations.accelerators import Job, accelerator, environment
from tests.integrations.test_lightning import Model, Reports, fit, pytestmark
from tests.integrations.test_transformers import trainer

__all__ = ["pytestmark"]

Make = Callable[[], distclip.Strategy]
STRATEGIES: dict[str, Make | None] = {
    "nothing": None,
    "GlobalNorm": lambda: distclip.GlobalNorm(0.5),
    "Percentile": lambda: distclip.Percentile(
        warmup=2, percentile=50, multiplier=0.9, history=8, initial=0.3
    ),
    "Percentile of 9": lambda: distclip.Percentile(
        warmup=2, percentile=50, multiplier=0.9, history=9, initial=0.3
    ),
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "AdaGC": lambda: distclip.AdaGC(warmup=2),
    "Chain": lambda: distclip.Chain(distclip.SkipSpikes(), distclip.GlobalNorm(0.5)),
}
# What the log must say where the state is left out.
ROWS = {
    ("Percentile", "nothing"): "",
    ("nothing", "Percentile"): "",
    ("nothing", "nothing"): "",
    ("Percentile", "Percentile"): "",
    ("Percentile", "ZClip"): "saved by Percentile.*this is ZClip",
    ("Percentile", "GlobalNorm"): "saved by Percentile.*this is GlobalNorm",
    ("GlobalNorm", "Percentile"): "saved by GlobalNorm.*this is Percentile",
    ("AdaGC", "Chain"): "saved by AdaGC.*this is Chain",
    ("Chain", "AdaGC"): "saved by Chain.*this is AdaGC",
    ("Percentile", "Percentile of 9"): "history=8.*history=9",
}
STEPS = 3


def with_accelerate(make: Make | None, where: Path, resume: bool) -> list[float]:
    kind = "ddp" if dist.is_initialized() else "single"
    with accelerator(kind) as a:
        job = Job(a, kind)
        handle = None if make is None else accelerate.install(a, make())
        if resume:
            a.load_state(str(where))
        thresholds = []
        for seed in range(STEPS * resume, STEPS * (1 + resume)):
            job.backward(seed)
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            if handle is not None and handle.report is not None and handle.report.threshold.dim() == 0:
                thresholds.append(handle.report.threshold.item())
            job.optimizer.step()
            job.optimizer.zero_grad()
        if not resume:
            a.save_state(str(where))
        return thresholds


def with_trainer(make: Make | None, where: Path, resume: bool) -> list[float]:
    with environment(dist.is_initialized()):
        t = trainer(where, max_steps=2 * STEPS, save_strategy="steps", save_steps=STEPS)
        if make is not None:
            transformers.install(t, make())
        if not resume:
            t.args.max_steps = STEPS
            t.train()
        else:
            t.train(resume_from_checkpoint=str(where / f"checkpoint-{STEPS}"))
        entries = t.state.log_history
        return [
            e["clip_threshold"] for e in entries if "clip_threshold" in e and (e["step"] > STEPS) == resume
        ]


def with_lightning(make: Make | None, where: Path, resume: bool) -> list[float]:
    callbacks: list[Any] = []
    reports = None
    if make is not None:
        clip = ClipGradients(make())
        reports = Reports(clip)
        callbacks = [clip, reports]
    saved = where / "saved.ckpt"
    t = fit(Model(), *callbacks, ckpt_path=saved if resume else None, max_epochs=1 + resume)
    if not resume:
        t.save_checkpoint(saved)
    if reports is None:
        return []
    return [r.threshold.item() for r in reports.seen if r.threshold.dim() == 0]


FRAMEWORKS = {"accelerate": with_accelerate, "trainer": with_trainer, "lightning": with_lightning}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("saved", "loaded"), ROWS)
def test_a_checkpoint_goes_with_whatever_loads_it(
    saved: str, loaded: str, framework: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = FRAMEWORKS[framework]
    train(STRATEGIES[saved], tmp_path, False)
    with caplog.at_level(logging.WARNING, "distclip"):
        thresholds = train(STRATEGIES[loaded], tmp_path, True)
    said = [r.getMessage() for r in caplog.records if r.name == "distclip"]
    words = ROWS[saved, loaded]
    left_out = [text for text in said if "state of the clipping strategy is left out" in text]
    assert len(left_out) == bool(words), said
    if words:
        assert re.search(words, left_out[0]), left_out[0]
    if loaded.startswith("Percentile"):  # which begins at 0.3, unless it goes on
        assert (thresholds[0] == pytest.approx(0.3)) == (saved != loaded)


@pytest.mark.parametrize("framework", ["accelerate", "trainer"])
@on_ranks(2)
def test_another_strategy_on_two_ranks(rank: int, framework: str, tmp_path: Path) -> list[float]:
    train = FRAMEWORKS[framework]
    train(STRATEGIES["Percentile"], tmp_path, False)
    dist.barrier()
    return train(STRATEGIES["ZClip"], tmp_path, True)
