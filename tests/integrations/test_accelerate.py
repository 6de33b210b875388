"""Accelerate's own run and the same with distclip, side by side; and where Accelerate is wrong or refuses.

What stands for a GPU here is said in ``tests/integrations/accelerators.py``. Every right answer is that of
one process in float64, on the batch of all ranks.
"""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradScalerKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.integrations.accelerate import Installed, install
from tests.counting import compares
from tests.harness import let_go, on_ranks
from tests.integrations.accelerators import (
    MAX_NORM,
    Alone,
    Job,
    accelerator,
    batch,
    before_1_15,
    loss_of,
    net,
    plain,
    reset,
)

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


TP_FAILS = before_1_15("fails to clip under tensor parallelism")


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2", pytest.param("tp", marks=TP_FAILS)])
@on_ranks(2)
def test_two_ranks(rank: int, kind: str) -> list[float]:
    return side_by_side(kind)


@pytest.mark.parametrize("kind", ["hsdp", pytest.param("fsdp2_tp", marks=TP_FAILS)])
@on_ranks(4)
def test_four_ranks(rank: int, kind: str) -> list[float]:
    return side_by_side(kind)


# --- where Accelerate is wrong, or refuses --------------------------------------------------------------


@on_ranks(2)
def test_the_norm_under_fsdp2_is_no_dtensor(rank: int) -> list[float]:
    with accelerator("fsdp2") as a:
        job = Job(a, "fsdp2")
        job.backward(0)
        theirs = a.clip_grad_norm_(job.model.parameters(), LARGE)
        assert isinstance(theirs, DTensor)
        handle = install(a)
        mine = a.clip_grad_norm_(job.model.parameters(), LARGE)
        assert is_plain(mine)
        assert handle.report is not None
        assert handle.report.total_norm is mine
        return [mine.item()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2", "tp"])
@on_ranks(2)
def test_value_clipping(rank: int, kind: str) -> None:
    """Accelerate refuses it under FSDP, and torch cannot mix DTensors (tensor parallelism) with others."""
    alone = Alone()
    with accelerator(kind) as a:
        job = Job(a, kind)
        for seed in range(2):
            job.backward(seed)
            alone.backward(seed)
            if kind.startswith("fsdp"):
                with pytest.raises(Exception, match="do not support `clip_grad_value_`"):
                    a.clip_grad_value_(job.model.parameters(), 0.01)
            elif kind == "tp":
                with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
                    a.clip_grad_value_(job.model.parameters(), 0.01)
            with install(a):
                assert a.clip_grad_value_(job.model.parameters(), 0.01) is None
            for p in alone.model.parameters():
                assert p.grad is not None
                assert p.grad.abs().max() > 0.01
                p.grad.clamp_(-0.01, 0.01)
            job.optimizer.step()
            job.optimizer.zero_grad()
            alone.step()
        assert_equal(job.whole(), alone.whole())


def part(job: Job, prefix: str) -> list[Tensor]:
    """A new list each time, as scripts make it."""
    names = {"_fsdp_wrapped_module", "module"}
    return [
        p
        for name, p in job.model.named_parameters()
        if ".".join(w for w in name.split(".") if w not in names).startswith(prefix)
    ]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_a_part_of_the_parameters(rank: int, kind: str) -> list[float]:
    """Accelerate knows FSDP1's whole list only: of any other each rank takes the norm of what it holds."""
    alone, norms = Alone(), []
    with accelerator(kind) as a:
        job = Job(a, kind)
        job.backward(0)
        theirs = plain(a.clip_grad_norm_(part(job, "second"), LARGE))
        alone.backward(0)
        right = alone.norm(prefix="second")
        if kind == "fsdp1":
            assert theirs < 0.95 * right
        else:
            assert theirs == pytest.approx(right, rel=1e-5)

        install(a)
        for _ in range(2):
            for prefix in ("first", "second"):
                norms.append(a.clip_grad_norm_(part(job, prefix), MAX_NORM).item())
                assert norms[-1] == pytest.approx(alone.norm(prefix=prefix), rel=1e-5)
                alone.scale(MAX_NORM, prefix)
            assert norms[0] > 4 * MAX_NORM
        job.optimizer.step()
        alone.step()
        assert_equal(job.whole(), alone.whole())
    return norms


# --- loss scaling ---------------------------------------------------------------------------------------

SCALE = 2.0**10


@pytest.mark.parametrize("how", ["whole", "parts", "by hand first", "value", "whole twice"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "tp"])
@on_ranks(2)
def test_float16_is_unscaled_once(rank: int, kind: str, how: str) -> list[float]:
    """In float16, so compared with rounding; a factor of the loss scale is 1024."""
    alone, norms = Alone(), []
    with accelerator(kind, fp16=SCALE) as a:
        job = Job(a, kind)
        install(a)
        for seed in range(2):
            job.backward(seed)
            alone.backward(seed)
            if how == "by hand first":
                a.unscale_gradients()
            if how == "parts":
                for prefix in ("first", "second", "head"):
                    norms.append(a.clip_grad_norm_(part(job, prefix), MAX_NORM).item())
                    assert norms[-1] == pytest.approx(alone.norm(prefix=prefix), rel=0.02)
                    alone.scale(MAX_NORM, prefix)
            elif how == "value":
                a.clip_grad_value_(job.model.parameters(), 0.01)
                for p in alone.model.parameters():
                    p.grad.clamp_(-0.01, 0.01)  # type: ignore[union-attr]
            else:
                norms.append(a.clip_grad_norm_(job.model.parameters(), MAX_NORM).item())
                assert norms[-1] == pytest.approx(alone.norm(), rel=0.02)
                alone.scale(MAX_NORM)
            if how == "whole twice":
                again = a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
                assert again.item() == pytest.approx(MAX_NORM, rel=1e-4)
            job.optimizer.step()
            job.optimizer.zero_grad()
            alone.step()
        assert_equal(job.whole(), alone.whole(), rel=2e-3)
        assert a.scaler.get_scale() == SCALE
    return norms


@on_ranks(2)
def test_float16_and_a_part_of_the_parameters_in_accelerate(rank: int) -> None:
    """It unscales all optimizers at each call, under FSDP even twice for a part of the model; and it cannot
    unscale DTensors beside plain tensors at all."""
    with accelerator("ddp", fp16=SCALE) as a:
        job = Job(a, "ddp")
        job.backward(0)
        a.clip_grad_norm_(part(job, "first"), MAX_NORM)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
            a.clip_grad_norm_(part(job, "second"), MAX_NORM)
    for kind in ("fsdp1", "fsdp2"):
        with accelerator(kind, fp16=SCALE) as a:
            job = Job(a, kind)
            job.backward(0)
            with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
                a.clip_grad_norm_(part(job, "first"), MAX_NORM)
    with accelerator("tp", fp16=SCALE) as a:
        job = Job(a, "tp")
        job.backward(0)
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            a.clip_grad_norm_(job.model.parameters(), MAX_NORM)


def two_optimizers(kind: str, with_distclip: bool) -> tuple[dict[str, Tensor], float]:
    """One backward pass for both, of which the second is left out in the second step."""
    with accelerator(kind, fp16=SCALE) as a:
        job = Job(a, kind)
        groups = [[*part(job, "first"), *part(job, "head")], part(job, "second")]
        both = [a.prepare_optimizer(torch.optim.SGD(g, lr=0.05, foreach=False)) for g in groups]
        a._optimizers[:] = both
        handle = install(a) if with_distclip else None
        for seed in range(3):
            job.backward(seed)
            a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
            for optimizer in both[: 1 if seed == 1 else 2]:
                optimizer.step()
            for p in job.model.parameters():
                p.grad = None
        if handle is not None:
            handle.remove()
            assert "update" not in vars(a.scaler)
        return job.whole(), a.scaler.get_scale()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@on_ranks(2)
def test_float16_with_two_optimizers(rank: int, kind: str) -> None:
    """Accelerate updates the scaler at the step of the first, whereupon it unscales the second again."""
    alone = Alone()
    for seed in range(3):
        alone.backward(seed)
        alone.scale(MAX_NORM)
        if seed == 1:
            for name, p in alone.named.items():
                p.grad *= not name.startswith("second")  # type: ignore[operator]
        alone.step()
    whole, scale = two_optimizers(kind, True)
    assert_equal(whole, alone.whole(), rel=2e-3)
    assert scale == SCALE
    theirs, _ = two_optimizers(kind, False)
    start = net().state_dict()
    for name in start:
        moved = (theirs[name] - start[name]).norm() / (alone.whole()[name] - start[name]).norm()
        assert (moved < 0.3) == name.startswith("second"), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("strategy", [None, distclip.GlobalNorm])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_an_infinity_on_one_rank_is_skipped_by_all(
    rank: int, kind: str, strategy: Any, fused: bool
) -> list[float]:
    with accelerator(kind, fp16=SCALE) as a:
        job = Job(a, kind, torch.optim.Adam, fused=fused, **({"foreach": None} if fused else {}))
        install(a, strategy() if strategy else None)
        weights, scales = [job.whole()], []
        for seed, bad in enumerate([None, math.inf, None]):
            job.backward(seed, bad=bad)
            if seed < 2:  # what was skipped leaves nothing behind for a step that is not clipped
                norm = a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
                assert bool(norm.isfinite()) == (bad is None)
            job.optimizer.step()
            job.optimizer.zero_grad()
            weights.append(job.whole())
            scales.append(a.scaler.get_scale())
        assert scales == [SCALE, SCALE / 2, SCALE / 2]
        for name in weights[0]:
            assert not torch.equal(weights[0][name], weights[1][name])
            assert torch.equal(weights[1][name], weights[2][name])
            assert not torch.equal(weights[2][name], weights[3][name])
        return scales


# --- without a scaler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@on_ranks(2)
def test_a_strategy_leaves_out_a_bad_step(rank: int, kind: str, fused: bool) -> None:
    """As if it had never been: against the same run without it."""
    ends = []
    for seeds in ([0, 1, 2], [0, "bad", 1, 2]):
        with accelerator(kind) as a:
            options = {"fused": True, "foreach": None} if fused else {}
            job = Job(a, kind, torch.optim.AdamW, weight_decay=0.1, **options)
            handle = install(a, distclip.Percentile(warmup=1, percentile=50, multiplier=0.5))
            for seed in seeds:
                job.backward(7 if seed == "bad" else seed, bad=math.nan if seed == "bad" else None)
                a.clip_grad_norm_(job.model.parameters(), 1.0)
                assert handle.report is not None
                assert bool(handle.report.skipped) == (seed == "bad")
                grads = [p.grad for p in job.model.parameters()]
                job.optimizer.step()
                assert all(p.grad is g for p, g in zip(job.model.parameters(), grads, strict=True))
                job.optimizer.zero_grad()
            assert bool(handle.report.clipped)
            ends.append(job.whole())
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_accumulation(rank: int, kind: str, guarded: bool) -> list[float]:
    """Two micro-batches a step; ``guarded`` as Accelerate's documentation has it, or without the ``if``."""
    alone, norms = Alone(), []
    with accelerator(kind, gradient_accumulation_steps=2) as a:
        job = Job(a, kind)
        install(a)
        for seed in range(2):
            alone.backward(seed)
            for micro in range(2):
                with a.accumulate(job.model):
                    job.backward(seed, rows=slice(rank + 2 * micro, None, 4))
                    if a.sync_gradients or not guarded:
                        norm = a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
                        a.clip_grad_value_(job.model.parameters(), LARGE)
                        assert is_plain(norm)
                        assert bool(norm.isnan()) == (micro == 0)
                    job.optimizer.step()
                    job.optimizer.zero_grad()
            norms.append(norm.item())
            assert norms[-1] == pytest.approx(alone.norm(), rel=1e-5)
            alone.scale(MAX_NORM)
            alone.step()
        assert_equal(job.whole(), alone.whole())
    return norms


@on_ranks(2)
def test_accumulation_in_accelerate_without_the_if(rank: int) -> None:
    """It clips what each rank has for itself: another norm on each, and another gradient in the end."""
    with accelerator("ddp", gradient_accumulation_steps=2) as a:
        job, alone = Job(a, "ddp"), Alone()
        alone.backward(0)
        with a.accumulate(job.model):
            job.backward(0, rows=slice(rank, None, 4))
            norm = a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
        others: list[Any] = [None, None]
        dist.all_gather_object(others, norm.item())
        assert others[0] != pytest.approx(others[1], rel=0.01)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_unsynchronised_gradients_are_an_error(rank: int, kind: str) -> None:
    """``no_sync`` by hand, of which ``sync_gradients`` knows nothing."""
    with accelerator(kind) as a:
        job = Job(a, kind)
        install(a)
        job.backward(0)
        a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
        job.optimizer.zero_grad()
        with a.no_sync(job.model):
            job.backward(1)
        with pytest.raises((ValueError, distclip.OwnershipError)):
            a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
        job.backward(1)  # which synchronises what there is
        a.clip_grad_norm_(job.model.parameters(), MAX_NORM)


@on_ranks(2)
def test_a_loss_judging_strategy_gets_the_mean_of_the_micro_batches(rank: int) -> list[float]:
    seen = []

    class Judge(distclip.Strategy):
        uses_loss = True

        def forward(self, norms: Any) -> distclip.Scale:
            seen.append(norms.loss.item())
            return distclip.Scale(torch.ones_like(norms.total), norms.total)

    with accelerator("fsdp2", gradient_accumulation_steps=2) as a:
        job, alone = Job(a, "fsdp2"), Alone()
        install(a, Judge())
        for seed in range(2):
            for micro in range(2):
                with a.accumulate(job.model):
                    job.backward(seed, rows=slice(rank + 2 * micro, None, 4))
                    a.clip_grad_norm_(job.model.parameters(), 1.0)
        want = [loss_of(alone.model, *(t.double() for t in batch(seed))).item() for seed in range(2)]
        assert seen == pytest.approx(want, rel=1e-5)
    return seen


@pytest.mark.parametrize(
    ("kind", "fp16", "count"), [("ddp", None, 0), ("fsdp1", SCALE, 1), ("fsdp2", SCALE, 1)]
)
@on_ranks(2)
def test_collectives(rank: int, kind: str, fp16: float | None, count: int) -> None:
    """Unscaling and the agreement on infinities join the reduction of the norm."""
    with accelerator(kind, fp16=fp16) as a:
        job = Job(a, kind)
        handle = install(a)
        for call in (1, 2, 3):  # the first makes the plan
            job.backward(0)
            with CommDebugMode() as comm:
                a.clip_grad_norm_(job.model.parameters(), MAX_NORM)
            job.optimizer.step()
            job.optimizer.zero_grad()
            assert handle.clipper is not None
            compared = compares(handle.clipper, call)
            assert call == 1 or comm.get_total_counts() == count + compared
        assert compared == 0


# --- strategies and their state -------------------------------------------------------------------------


def percentile() -> distclip.Percentile:
    return distclip.Percentile(percentile=50, multiplier=0.5, warmup=2, initial=1.0)


def steps(a: Accelerator, job: Job, handle: Installed, seeds: range) -> list[float]:
    thresholds = []
    for seed in seeds:
        job.backward(seed)
        a.clip_grad_norm_(job.model.parameters(), 123.0)  # which the strategy decides
        assert handle.report is not None
        thresholds.append(handle.report.threshold.item())
        job.optimizer.step()
        job.optimizer.zero_grad()
    return thresholds


def through_a_checkpoint(kind: str, where: Path) -> list[float]:
    with accelerator(kind) as a:
        job = Job(a, kind)
        whole = steps(a, job, install(a, percentile()), range(6))
        end = job.whole()
    assert len(set(whole)) == 6
    with accelerator(kind) as a:
        job = Job(a, kind)
        first = steps(a, job, install(a, percentile()), range(3))
        a.save_state(str(where))
    with accelerator(kind) as a:
        job = Job(a, kind)
        handle = install(a, percentile())
        a.load_state(str(where))
        assert first + steps(a, job, handle, range(3, 6)) == whole
        assert_equal(job.whole(), end, rel=1e-12)
        a.load_state(str(where))  # again, when there is something to overwrite
        assert steps(a, job, handle, range(3, 6)) == whole[3:]
    return whole


def test_state_through_a_checkpoint(tmp_path: Path) -> None:
    through_a_checkpoint("single", tmp_path)


@on_ranks(2)
def test_state_through_a_checkpoint_of_two_ranks(rank: int, tmp_path: Path) -> list[float]:
    return through_a_checkpoint("ddp", tmp_path)


def test_a_strategy_with_state_belongs_to_one_list() -> None:
    with accelerator("single") as a:
        job = Job(a, "single")
        handle = install(a, percentile())
        job.backward(0)
        a.clip_grad_norm_(part(job, "first"), 1.0)
        with pytest.raises(ValueError, match=r"install\(accelerator, distclip.Percentile\)"):
            a.clip_grad_norm_(part(job, "second"), 1.0)
        handle.remove()

        handle, alone = install(a, percentile), Alone()  # what makes one
        for seed in range(4):
            job.optimizer.zero_grad()
            job.backward(seed)
            for prefix in ("first", "second"):
                a.clip_grad_norm_(part(job, prefix), 1.0)
        states = handle.state_dict()["lists"]
        assert len(states) == 2
        for prefix, state in zip(("first", "second"), states, strict=True):
            norms = []
            for seed in range(4):
                alone.backward(seed)
                norms.append(alone.norm(prefix=prefix))
            kept = [t for t in state["strategy"].values() if t.dim() == 1]
            assert kept[0][:4].tolist() == pytest.approx(norms, rel=1e-5)

        handle.remove()
        with install(a, percentile) as fresh:  # states wait for their lists
            fresh.load_state_dict({"lists": states})
            assert len(fresh.state_dict()["lists"]) == 2
            a.clip_grad_norm_(part(job, "first"), 1.0)
            a.clip_grad_norm_(part(job, "second"), 1.0)
            for old, new in zip(states, fresh.state_dict()["lists"], strict=True):
                assert new["strategy"].keys() == old["strategy"].keys()
                assert any(not torch.equal(new["strategy"][k], old["strategy"][k]) for k in old["strategy"])


def test_an_infinite_max_norm_only_measures() -> None:
    with accelerator("single") as a:
        job = Job(a, "single")
        handle = install(a, distclip.Percentile(warmup=1, percentile=50, multiplier=0.1))
        job.backward(0)
        before = [p.grad.clone() for p in job.model.parameters()]  # type: ignore[union-attr]
        alone = Alone()
        alone.backward(0)
        assert a.clip_grad_norm_(job.model.parameters(), math.inf, 1).item() == pytest.approx(alone.norm(1.0))
        assert handle.report is None
        assert handle.state_dict() == {"lists": []}
        assert all(torch.equal(p.grad, g) for p, g in zip(job.model.parameters(), before, strict=True))
        a.clip_grad_norm_(job.model.parameters(), 1e9)
        assert handle.report is not None
        assert handle.report.coefficient.item() == pytest.approx(0.1, rel=1e-4)


# --- many steps, many models ----------------------------------------------------------------------------


@on_ranks(2)
def test_new_lists_of_the_same_parameters_are_planned_once(rank: int) -> None:
    from distclip.current import parameter_set as module
    from distclip.integrations import _lists as integration

    made = []
    originals = {m: m.build_plan for m in (module, integration)}
    for m in originals:
        m.build_plan = lambda *args, _m=m, **kw: (made.append(1), originals[_m](*args, **kw))[1]  # type: ignore
    try:
        with accelerator("fsdp1", fp16=SCALE) as a:
            job = Job(a, "fsdp1")
            install(a)
            for seed in range(4):
                job.backward(seed)
                a.clip_grad_norm_([p for p in job.model.parameters() if p.requires_grad], 1.0)
                a.clip_grad_norm_((p for p in job.model.parameters()), float(seed))
                a.clip_grad_value_(list(job.model.parameters()), 0.5)
                job.optimizer.step()
                job.optimizer.zero_grad()
    finally:
        for m, original in originals.items():
            m.build_plan = original  # type: ignore
    assert len(made) == 2  # one for the norm, one for the values, which needs no other rank


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_models_that_the_accelerator_forgets_die(rank: int, kind: str) -> None:
    with accelerator(kind) as a:
        install(a)
        for _ in range(2):
            job = Job(a, kind)
            job.backward(0)
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            a.clip_grad_value_(job.model.parameters(), 1.0)
            job.optimizer.step()
            dead = [weakref.ref(job.model), *map(weakref.ref, job.model.parameters())]
            dist.barrier()
            a.free_memory()
            del job
            assert let_go(*dead)


# --- the handle -----------------------------------------------------------------------------------------


def test_removal() -> None:
    with accelerator("single") as a:
        job = Job(a, "single")
        with install(a, percentile()) as handle:
            with pytest.raises(ValueError, match="installed in this accelerator already"):
                install(a)
            job.backward(0)
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            assert handle.clipper is not None
            assert "first.up.weight" in str(handle.clipper.describe())
            assert a._custom_objects == []  # its state goes to a file of its own
        handle.remove()
        assert a._custom_objects == []
        for name in ("clip_grad_norm_", "clip_grad_value_", "unscale_gradients", "free_memory", "backward"):
            assert name not in vars(a)
            assert getattr(a, name).__func__ is getattr(Accelerator, name)
        assert not job.optimizer.optimizer._optimizer_step_pre_hooks
        with install(a):
            assert a._custom_objects == []  # no state: a checkpoint from before it was installed still loads
        own = a.backward = lambda loss: loss.backward()  # of the script
        install(a).remove()
        assert a.backward is own
        install(a).remove()


def test_what_cannot_be_is_explained() -> None:
    with accelerator("single") as a:
        for kind, words in {
            DistributedType.DEEPSPEED: "DeepSpeed's engine clips .* `gradient_clipping`",
            DistributedType.MEGATRON_LM: "Megatron-LM's optimizer clips .* distclip.integrations.megatron",
            DistributedType.XLA: "torch_xla",
        }.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(a.state.__dict__, "distributed_type", kind)
                with pytest.raises(ValueError, match=words):
                    install(a)
        with pytest.raises(TypeError, match=r"expected an accelerate.Accelerator"):
            install(nn.Linear(1, 1))
        with pytest.raises(TypeError, match=r"strategy=1.0: expected a distclip.Strategy"):
            install(a, 1.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="on_nonfinite"):
            install(a, on_nonfinite="ignore")  # type: ignore[arg-type]
        install(a)
        with pytest.raises(ValueError, match="max_norm=-1"):
            a.clip_grad_norm_([nn.Parameter(torch.ones(1))], -1)
        with pytest.raises(ValueError, match="iterator that yields nothing"):
            a.clip_grad_norm_(iter([]), 1.0)


# --- on a GPU, unmodified -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_distclip", [False, True])
def test_float16_on_a_gpu(with_distclip: bool) -> None:
    reset()
    try:
        # At the usual scale of 65536 the gradient of the last layer would be infinite.
        a = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=SCALE)])
        alone = Alone()
        model = net()
        model, optimizer = a.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        if with_distclip:
            install(a)
        for seed in range(3):
            a.backward(loss_of(model, *(t.to(a.device) for t in batch(seed))))
            alone.backward(seed)
            norm = a.clip_grad_norm_(model.parameters(), MAX_NORM)
            assert norm.item() == pytest.approx(alone.norm(), rel=0.02)
            alone.scale(MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            alone.step()
        assert_equal(
            {n: p.detach().double().cpu() for n, p in model.named_parameters()}, alone.whole(), rel=2e-3
        )
    finally:
        reset()
