"""Clipper.step: unscales once, agrees on infinities, steps or skips. And distclip.unscale_."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.apply.optimizer_step import readable
from tests import oracle
from tests.counting import compares
from tests.harness import on_ranks, on_row
from tests.layouts import mesh1, mesh2
from tests.step.spread import (
    OPTIMIZERS,
    ROWS,
    SCALERS,
    built,
    fsdp2,
    kind,
    loss_of,
    model,
    seeds,
    single,
    trained_alone,
)

SCALE = 1024.0
DISTRIBUTED = {name: row for name, row in ROWS.items() if row.world > 1}


def scaler_of(scale: float = SCALE, **kwargs: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **kwargs)


def everyone(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def values(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


# --- one process ---------------------------------------------------------------------------------------


def test_failure_12_unscaled_exactly_once() -> None:
    """Forgetting to unscale clips by a norm that is `scale` times too large; unscaling twice, not at all."""
    spread, scaler = single(), scaler_of()
    spread.backward(1)
    want = oracle.norm(oracle.dense_gradients(spread.model.parameters()))
    spread.model.zero_grad()
    spread.backward(1, scaler.scale)
    forgotten = torch.nn.utils.get_total_norm([p.grad for p in spread.model.parameters()])  # type: ignore[misc]
    assert forgotten.item() == pytest.approx(SCALE * want, rel=1e-5)

    for called_before in (False, True):
        spread = single()
        opt, scaler = torch.optim.SGD(spread.model.parameters(), 1.0), scaler_of()
        before = values(spread.model)
        spread.backward(1, scaler.scale)
        if called_before:
            scaler.unscale_(opt)
        report = distclip.Clipper(spread.model, distclip.GlobalNorm(0.5)).step(opt, scaler)
        assert report.total_norm.item() == pytest.approx(want, rel=1e-5)
        moved = oracle.norm(a - b for a, b in zip(values(spread.model), before, strict=True))
        assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True])
def test_trains_what_torchs_own_sequence_trains(optimizer: str, fused: bool, max_norm: float) -> None:
    bad = (None, math.inf, None, None, math.nan, None)
    mine, theirs = single(), single()
    runs = [(s, OPTIMIZERS[optimizer](s.groups(), **kind(fused=fused))) for s in (mine, theirs)]
    scalers = [scaler_of(growth_interval=2) for _ in runs]
    clipper = distclip.Clipper(mine.model, distclip.GlobalNorm(max_norm))
    for seed, value in seeds(bad):
        for (spread, opt), scaler in zip(runs, scalers, strict=True):
            opt.zero_grad()
            spread.backward(seed, scaler.scale, value)
        report = clipper.step(runs[0][1], scalers[0])
        scalers[1].unscale_(runs[1][1])
        norm = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), max_norm)
        scalers[1].step(runs[1][1])
        scalers[1].update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        if value is None:
            assert report.total_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(values(mine.model), values(theirs.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_fused_step_on_the_cpu_waits_for_flags_from_the_gpu() -> None:
    """torch's own copy of them to where the parameters are does not wait for the GPU to have written them."""
    with FakeTensorMode():
        on_cpu, on_gpu = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="cuda:0"))
        flag = torch.zeros((), device="cuda:0")
        for parameters, where in (([on_cpu], "cpu"), ([on_gpu, on_cpu], "cpu"), ([on_gpu], "cuda")):
            optimizer = torch.optim.SGD([{"params": [p]} for p in parameters])
            given = readable(optimizer, flag)
            assert given is not None
            assert given.device.type == where
        assert readable(optimizer, None) is None


def test_several_optimizers_step_or_skip_together() -> None:
    for bad in (False, True):
        net, scaler = model(), scaler_of()
        first = torch.optim.AdamW(net[0].parameters(), 0.1, fused=True)
        second = torch.optim.SGD(net[1].parameters(), 0.1)
        clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
        scaler.scale(loss_of(net(torch.randn(4, 8)), torch.randn(4, 8))).backward()
        if bad:  # which torch's scaler would hold against the first alone
            net[0].up.weight.grad[0, 0] = math.inf
        before = [values(net[0]), values(net[1])]
        clipper.step([first, second], scaler)
        for part, was in zip(net, before, strict=True):
            same = [torch.equal(a, b) for a, b in zip(values(part), was, strict=True)]
            assert all(same) if bad else not any(same)
        assert scaler.get_scale() == (SCALE / 2 if bad else SCALE)
        assert clipper.steps == 1


def test_without_a_scaler_and_with_one_that_is_off() -> None:
    results = []
    for scaler in (None, GradScaler("cpu", enabled=False)):
        spread = single()
        opt = torch.optim.SGD(spread.model.parameters(), 0.1)
        spread.backward(1, scaler.scale if scaler else lambda loss: loss)
        distclip.Clipper(spread.model, distclip.GlobalNorm(0.5)).step(opt, scaler)
        results.append(values(spread.model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_misuse_is_an_error_before_anything_is_touched() -> None:
    net = model()
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    first, second = (torch.optim.SGD(part.parameters(), 0.1) for part in net)

    def scaled() -> GradScaler:
        net.zero_grad()
        scaler = scaler_of()
        scaler.scale(loss_of(net(torch.randn(4, 8)), torch.randn(4, 8))).backward()
        return scaler

    before = values(net)
    scaled()
    with pytest.raises(ValueError, match="never scaled a loss"):
        clipper.step([first, second], scaler_of())
    scaler = scaled()
    scaler.unscale_(first)
    with pytest.raises(ValueError, match="for some of the optimizers and not for others"):
        clipper.step([first, second], scaler)
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\] of SGD .* not among the clipper's"):
        clipper.step(torch.optim.SGD([stranger], 0.1), scaled())
    with pytest.raises(ValueError, match="not among the clipper's"):
        distclip.unscale_(scaled(), torch.optim.SGD([stranger], 0.1), clipper)
    scaler = scaled()
    distclip.unscale_(scaler, first, clipper)
    with pytest.raises(ValueError, match="unscaled already"):
        distclip.unscale_(scaler, first, clipper)
    assert all(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))
    scaler = scaled()
    scaler.step(first)
    with pytest.raises(ValueError, match="has been called already"):
        clipper.step([first], scaler)


def test_adaptive_strategies_see_unscaled_norms() -> None:
    histories = []
    for scaler in (None, scaler_of(growth_interval=1)):  # twice the scale after each step
        spread, strategy = single(), distclip.ZClip(warmup=2)
        opt = torch.optim.SGD(spread.model.parameters(), 0.1)
        clipper = distclip.Clipper(spread.model, strategy)
        for seed in range(6):
            opt.zero_grad()
            spread.backward(seed, scaler.scale if scaler else lambda loss: loss)
            report = clipper.step(opt, scaler, param_norms=True)
            assert oracle.norm([torch.stack(list(report.param_norms.values()))]) == pytest.approx(
                report.total_norm.item(), rel=1e-5
            )
        histories.append({name: b.double() for name, b in strategy.named_buffers()})
    for name, plain in histories[0].items():
        torch.testing.assert_close(histories[1][name], plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("how", ["step", "unscale_"])
def test_sparse_gradients(how: str) -> None:
    net, scaler = nn.EmbeddingBag(6, 3, mode="sum", sparse=True), scaler_of()
    with torch.no_grad():
        net.weight.fill_(1.0)
    opt = torch.optim.SGD(net.parameters(), 1.0)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(1.0))
    scaler.scale(net(torch.tensor([[1, 1, 2]])).sum()).backward()  # rows 1 and 2: gradients of 2 and of 1
    if how == "step":
        total = clipper.step(opt, scaler).total_norm
    else:
        distclip.unscale_(scaler, opt, clipper)
        total = clipper.clip().total_norm
        scaler.step(opt)
        scaler.update()
    assert total.item() == pytest.approx(math.sqrt(3 * (4 + 1)))
    want = 1 - torch.tensor([0.0, 2, 1, 0, 0, 0])[:, None].expand(6, 3) / math.sqrt(15)
    torch.testing.assert_close(net.weight.detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deferred", [False, True])
def test_bfloat16_without_a_scaler(deferred: bool) -> None:
    bad = (None, math.inf, None, None)
    want, norms = trained_alone(bad, "AdamW", 0.5)
    spread = single()
    spread.model.bfloat16()
    opt = OPTIMIZERS["AdamW"](spread.groups(), **kind(fused=deferred))
    clipper = distclip.Clipper(
        spread.model, distclip.GlobalNorm(0.5), apply="deferred" if deferred else "inplace"
    )
    for (seed, value), norm in zip(seeds(bad), norms, strict=True):
        opt.zero_grad()
        spread.backward(seed, bad=value)
        report = clipper.step(opt)
        assert report.skipped.item() == (value is not None)
        if value is None:
            assert report.total_norm.dtype == torch.float32
            assert report.total_norm.item() == pytest.approx(norm, rel=2e-2)
    for name, got in spread.whole().items():
        torch.testing.assert_close(got, want[name], rtol=1e-2, atol=2e-2)


# --- several ranks -------------------------------------------------------------------------------------


@on_ranks(2)
def test_a_scale_too_high_for_float16_comes_down_on_all_ranks(rank: int) -> list[float]:
    """Real overflow of FSDP2's float16 gradients, on the one rank whose loss is large."""
    spread = fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16))
    opt, scaler = OPTIMIZERS["SGD"](spread.groups(), foreach=False), scaler_of(2.0**18)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(0.5))
    history, overflown = [], []
    for seed in range(12):
        opt.zero_grad()
        spread.backward(seed, lambda loss: scaler.scale(loss * (20 if rank else 0.05)))
        overflown.append(not all(g.isfinite().all() for g in local_gradients(spread.model)))
        report = clipper.step(opt, scaler)
        history += [scaler.get_scale(), report.skipped.item(), report.total_norm.nan_to_num(0, 0).item()]
    skipped = history[1::3]
    assert skipped[0]
    assert not skipped[-1]
    assert all(torch.isfinite(p).all() for p in values(spread.model))
    # What each rank would have found in its own shards:
    assert [any(on) for on in zip(*everyone(overflown), strict=True)] == skipped
    return history


def local_gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.to_local() for p in module.parameters() if p.grad is not None]  # type: ignore[union-attr]


@on_row(DISTRIBUTED)
def test_unscaled_by_us_then_torchs_order_of_calls(row: str) -> list[float]:
    """As Clipper.step, on every placement, with an infinity and without."""
    bad = (None, math.inf, None, math.nan, None)
    want, _ = trained_alone(bad, "SGD", 2.0)
    spread, scaler = built(row), scaler_of()
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(2.0), **spread.kwargs)
    assert clipper.plan is not None
    found = []
    for step, (seed, value) in enumerate(seeds(bad)):
        opt.zero_grad()
        spread.backward(seed, scaler.scale, value)
        with CommDebugMode() as comm:
            distclip.unscale_(scaler, opt, clipper)
        assert comm.get_total_counts() == ROWS[row].collectives + compares(clipper, 2 * step + 1)
        clipper.clip()
        scaler.step(opt)
        scaler.update()
        found.append(scaler.get_scale())
    assert found == [SCALE, SCALE / 2, SCALE / 2, SCALE / 4, SCALE / 4]
    for name, got in spread.whole().items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=2e-6)
    return found


Gradient = tuple[Any, tuple[Any, ...]]


def planted(rank: int, kinds: list[str], holder: int) -> list[Tensor]:
    """Parameters of those kinds; the sharded ones have an infinity on the rank ``holder`` alone."""
    mesh = mesh2(2, 2, "a", "b")
    homes: dict[str, Gradient | None] = {
        "sharded": (mesh, (Shard(0), Shard(1))),
        "sharded on a": (mesh["a"], (Shard(0),)),
        "replicated": (mesh, (Replicate(), Replicate())),
        "replicated on b": (mesh["b"], (Replicate(),)),
        "plain": None,
    }
    tensors: list[Tensor] = []
    for name in kinds:
        home = homes[name]
        if home is None:
            parameter = nn.Parameter(torch.ones(4, 4))
            parameter.grad = torch.full((4, 4), SCALE)
        else:
            parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), *home))
            parameter.grad = distribute_tensor(torch.full((4, 4), SCALE), *home)
            if name == "sharded" and rank == holder:
                assert isinstance(parameter.grad, DTensor)
                parameter.grad.to_local()[0, 0] = math.inf
        tensors.append(parameter)
    return tensors


def scaled_once(scale: float = SCALE) -> GradScaler:
    scaler = scaler_of(scale)
    scaler.scale(torch.ones(()))
    return scaler


ORDERS = [
    ["sharded", "replicated"],
    ["replicated", "sharded"],
    ["sharded on a", "sharded"],
    ["replicated on b", "sharded"],
    ["plain", "sharded"],
    ["sharded", "plain", "replicated on b"],
]


@pytest.mark.parametrize("kinds", ORDERS, ids=", ".join)
@on_ranks(4)
def test_failure_02_and_09_first_gradient(rank: int, kinds: list[str]) -> list[Any]:
    """torch decides by the first gradient's mesh and placement: some ranks step, others skip, scales diverge.
    Beside a plain gradient, or one of another mesh, it raises, or does not look at all."""
    tensors = planted(rank, kinds, holder=2)
    theirs, opt = scaled_once(), torch.optim.SGD(tensors, 0.1, foreach=False)
    try:
        theirs.unscale_(opt)
        found = sum(f.item() for f in theirs._found_inf_per_device(opt).values())
    except RuntimeError as error:
        found = str(error).split(":")[0][:40]
    if kinds == ["replicated", "sharded"]:
        assert sorted(everyone(found)) == [0, 0, 0, 1]  # the scales diverge here

    for how in ("unscale_", "step", "step after torch's unscale_"):
        if "after" in how and not all(isinstance(f, float) for f in everyone(found)):
            continue  # torch's raises
        for holder in (2, None):
            tensors = planted(rank, kinds, holder=-1 if holder is None else holder)
            scaler, opt = scaled_once(), torch.optim.SGD(tensors, 0.1, foreach=False)
            clipper = distclip.Clipper(
                [(f"p{i}", t) for i, t in enumerate(tensors)], distclip.GlobalNorm(1e4)
            )
            before = [oracle.dense(t) for t in tensors]
            if how == "unscale_":
                distclip.unscale_(scaler, opt, clipper)
                clipper.clip()
                scaler.step(opt)
                scaler.update()
            else:
                if "after" in how:
                    scaler.unscale_(opt)
                clipper.step(opt, scaler)
            assert scaler.get_scale() == (SCALE if holder is None else SCALE / 2)
            for t, was in zip(tensors, before, strict=True):
                moved = 0.1 if holder is None else 0.0
                torch.testing.assert_close(oracle.dense(t), was - moved, rtol=1e-6, atol=0)
    return [scaler.get_scale()]


@on_ranks(2)
def test_unscale_of_one_of_two_optimizers_leaves_the_other_scaled(rank: int) -> None:
    mesh = mesh1(2)
    tensors = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(2)]
    for t in tensors:
        t.grad = distribute_tensor(torch.full((4,), SCALE), mesh, [Shard(0)])
    scaler, clipper = scaled_once(), distclip.Clipper(tensors, distclip.GlobalNorm(1.0))
    optimizers = [torch.optim.SGD([t], 1.0) for t in tensors]
    distclip.unscale_(scaler, optimizers[0], clipper)
    assert [oracle.dense(t.grad).unique().tolist() for t in tensors] == [[1.0], [SCALE]]  # type: ignore[union-attr]
    distclip.unscale_(scaler, optimizers[1], clipper)
    assert clipper.clip().total_norm.item() == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize("scaler", [name for name in SCALERS if name != "no scaler"])
def test_a_scaler_ends_what_propagate_would_destroy(scaler: str) -> None:
    """on_nonfinite="propagate" is torch's own behaviour, and torch's scaler skips all the same."""
    spread, sc = single(), SCALERS[scaler](init_scale=SCALE)
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(0.5), on_nonfinite="propagate")
    before = values(spread.model)
    spread.backward(1, sc.scale, math.nan)  # type: ignore[union-attr]
    assert clipper.step(opt, sc).skipped.item()
    assert sc.get_scale() == SCALE / 2  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(values(spread.model), before, strict=True))
    spread.model.zero_grad()
    spread.backward(1, bad=math.nan)
    assert not clipper.step(opt).skipped.item()
    assert any(p.isnan().any() for p in values(spread.model))


def test_counts_calls_and_continues_from_a_checkpoint() -> None:
    """The clipper's state, with steps and the strategy's history, through a file."""
    spread = single()
    opt = torch.optim.SGD(spread.model.parameters(), 0.1)

    def clipper() -> distclip.Clipper:
        return distclip.Clipper(spread.model, distclip.Percentile(history=8, warmup=2, initial=1.0))

    whole, state = clipper(), None
    reports: list[dict[str, Any]] = []
    for seed in range(8):
        if seed == 4:
            state = copy.deepcopy(whole.state_dict())
            weights, momenta = copy.deepcopy(spread.model.state_dict()), copy.deepcopy(opt.state_dict())
        opt.zero_grad()
        spread.backward(seed, bad=math.nan if seed == 2 else None)
        reports.append(whole.step(opt).to_dict())
    assert state is not None
    assert state["steps"] == 4
    assert whole.steps == 8
    resumed = clipper()
    resumed.load_state_dict(state)
    spread.model.load_state_dict(weights)
    opt.load_state_dict(momenta)
    for seed in range(4, 8):
        opt.zero_grad()
        spread.backward(seed)
        assert resumed.step(opt).to_dict() == reports[seed]
    assert resumed.steps == 8
