"""What happens to a step whose gradient is not finite: decided together, before anything is touched."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distclip
from distclip.inspection.diagnosis import say_where
from tests.harness import on_ranks, on_row
from tests.layouts import mesh1
from tests.step.spread import (
    DEFERRING,
    OPTIMIZERS,
    ROWS,
    SCALERS,
    Spread,
    built,
    fsdp1,
    kind,
    single,
    unchanged,
)

ADAPTIVE: dict[str, Any] = {
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "Percentile": lambda: distclip.Percentile(history=4, warmup=2),
    "AdaGC": lambda: distclip.AdaGC(warmup=2),
    "SkipSpikes": lambda: distclip.SkipSpikes(window=4, min_history=3),
}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everything(spread: Spread, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> list[Tensor]:
    """Parameters, gradients, optimizer's and strategy's state of this rank, to the bit."""
    tensors = [t for p in spread.model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in opt.state.values() for t in state.values() if isinstance(t, Tensor)]
    tensors += list(clipper.strategy.buffers())
    return [local(t).detach().clone() for t in tensors]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("policy", ["skip", "raise", "zero", "propagate"])
@on_row(ROWS)
def test_policies(row: str, policy: str) -> list[Any]:
    """Every policy on every placement, with an infinity from one rank, in one go and after good steps."""
    spread = built(row)
    opt = OPTIMIZERS["SGD"](spread.groups(), foreach=False)
    clipper = distclip.Clipper(
        spread.model,
        distclip.GlobalNorm(2.0),
        on_nonfinite=policy,  # type: ignore[arg-type]
        **spread.kwargs,
    )
    spread.backward(0)
    clipper.step(opt)
    opt.zero_grad()
    spread.backward(1, bad=math.inf)
    before = everything(spread, opt, clipper)
    if policy == "raise":
        with pytest.raises(distclip.NonFiniteError, match="no gradient was changed; not finite: '") as error:
            clipper.step(opt)
        assert_same_bits(everything(spread, opt, clipper), before)
        # Where copies are, each names its own.
        return [re.sub(r" on rank\(s\) [\d, ]+", "", str(error.value))]
    report = clipper.step(opt)
    assert report.nonfinite.item()
    assert report.skipped.item() == (policy == "skip")
    after = everything(spread, opt, clipper)
    if policy == "skip":
        assert_same_bits(after, before)
    elif policy == "zero":
        assert all(not local(p.grad).any() for p in spread.model.parameters() if p.grad is not None)
        assert all(p.isfinite().all() for p in spread.whole().values())
    else:
        assert any(p.isnan().any() for p in spread.whole().values())
    return [report.skipped.item()]


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [*product(["unfused", "fused"], OPTIMIZERS), *product(["deferred"], DEFERRING)],
)
@pytest.mark.parametrize("scaler", SCALERS)
def test_a_skipped_step_leaves_no_trace(scaler: str, way: str, optimizer: str) -> None:
    """Nor does one that comes first, before there is any optimizer state."""
    trained = []
    for bad in ((None, None, None), (math.nan, None, math.inf, None, math.nan, None)):
        spread, sc = single(), SCALERS[scaler](init_scale=2.0**6)
        opt = OPTIMIZERS[optimizer](spread.groups(), **kind(fused=way != "unfused"))
        clipper = distclip.Clipper(
            spread.model, distclip.GlobalNorm(2.0), apply="deferred" if way == "deferred" else "inplace"
        )
        good = iter(range(3))
        for value in bad:
            opt.zero_grad()
            junk = [torch.full_like(p, 7e3) for p in spread.model.parameters()]
            del junk  # what uninitialised memory would hold
            spread.backward(next(good) if value is None else 50, sc.scale if sc else unchanged, value)
            before = everything(spread, opt, clipper)
            assert clipper.step(opt, sc).skipped.item() == (value is not None)
            if value is not None and opt.state:
                after = everything(spread, opt, clipper)
                made = len(after) - len(before)  # state that Adam makes in its first step, of zeros
                assert not made or not any(t.any() for t in after[len(before) :])
                assert_same_bits(after[: len(before)], before)
        trained.append([p.detach().clone() for p in spread.model.parameters()])
    assert_same_bits(*trained)


@pytest.mark.parametrize("strategy", ADAPTIVE)
@on_row({name: ROWS[name] for name in ("single", "fsdp2", "pipeline")})
def test_bad_steps_never_enter_an_adaptive_history(row: str, strategy: str) -> None:
    """On_nonfinite= says what becomes of the gradients; the strategy forgets the step in any case."""
    for policy in ("skip", "zero", "raise"):
        spread = built(row)
        opt = torch.optim.SGD(spread.groups(), 0.0, foreach=False)
        clipper = distclip.Clipper(
            spread.model,
            ADAPTIVE[strategy](),
            on_nonfinite=policy,  # type: ignore[arg-type]
            **spread.kwargs,
        )
        for seed in range(4):
            opt.zero_grad()
            spread.backward(seed)
            clipper.step(opt)
        before = [t.clone() for t in clipper.strategy.buffers()]
        assert any(t.any() for t in before)
        for bad in (math.nan, math.inf):
            opt.zero_grad()
            spread.backward(9, bad=bad)
            if policy == "raise":
                with pytest.raises(distclip.NonFiniteError):
                    clipper.step(opt)
            else:
                clipper.step(opt)
        assert_same_bits(list(clipper.strategy.buffers()), before)


@on_ranks(2)
def test_a_spike_is_skipped_like_an_infinity(rank: int) -> float:
    """By the strategy's own decision: fused optimizers too, and the loss scale stays."""
    mesh = mesh1(2)
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    scaler = SCALERS["GradScaler"](init_scale=4.0)
    assert scaler is not None
    opt = torch.optim.AdamW([p], 0.1, fused=True)
    clipper = distclip.Clipper(p, distclip.SkipSpikes(window=8, min_history=4), apply="deferred")
    for step in range(8):
        size = 1 + 0.01 * (step % 3) if step != 6 else 1e3
        opt.zero_grad()
        scaler.scale((p * size).sum().full_tensor()).backward()  # type: ignore[union-attr]
        before = p.to_local().clone()  # type: ignore[attr-defined]
        report = clipper.step(opt, scaler)
        assert report.skipped.item() == (step == 6)
        assert not report.nonfinite.item()
        assert torch.equal(p.to_local(), before) == (step == 6)  # type: ignore[attr-defined]
    assert scaler.get_scale() == 4.0
    return report.total_norm.item()


# --- find_nonfinite ------------------------------------------------------------------------------------


def rows(indices: list[int], values: list[list[float]]) -> Tensor:
    """As an embedding of shape (4, 2) has its gradient."""
    return torch.sparse_coo_tensor([indices], values, (4, 2), check_invariants=True)


@on_ranks(2)
def test_names_and_ranks(rank: int) -> list[Any]:
    mesh = mesh1(2)
    named: list[tuple[str, Tensor]] = [
        ("sharded", nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)]))),
        ("replicated", nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))),
        ("plain", nn.Parameter(torch.ones(4))),
        ("without", nn.Parameter(torch.ones(4))),
        ("embedding", nn.Parameter(torch.ones(4, 2))),
        ("empty", nn.Parameter(distribute_tensor(torch.ones(1, 2), mesh, [Shard(0)]))),
    ]
    clipper = distclip.Clipper(named, distclip.GlobalNorm(1.0), on_nonfinite="raise")
    for name, p in named:
        if name != "without":
            p.grad = torch.zeros_like(p).detach()
    by_name = dict(named)
    by_name["embedding"].grad = rows([1, 1], [[1.0, 1.0], [2.0, 2.0]])
    found = [clipper.find_nonfinite()]
    assert found == [{}]

    by_name["plain"].grad[0] = math.nan  # type: ignore[index]
    by_name["embedding"].grad = rows([1], [[math.inf, 0.0]])
    if rank == 1:
        by_name["sharded"].grad.to_local()[0, 1] = -math.inf  # type: ignore[union-attr]
    found.append(clipper.find_nonfinite())
    assert list(found[1].items()) == [("sharded", (1,)), ("plain", (0, 1)), ("embedding", (0, 1))]
    with pytest.raises(distclip.NonFiniteError) as error:
        clipper.clip()
    words = "not finite: 'sharded' on rank(s) 1; 'plain' on rank(s) 0, 1; 'embedding' on rank(s) 0, 1"
    assert str(error.value).endswith(words)
    return [*found, str(error.value)]


@on_row(ROWS)
def test_finds_what_came_through_backward(row: str) -> dict[str, tuple[int, ...]]:
    spread = built(row)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0), **spread.kwargs)
    spread.backward(1)
    assert clipper.find_nonfinite() == {}
    spread.model.zero_grad()
    spread.backward(1, bad=math.nan)
    found = clipper.find_nonfinite()
    assert any("up.weight" in name for name in found)
    assert not any("down" in name for name in found if "1." in name)  # the later block's
    world = dist.get_world_size() if dist.is_initialized() else 1
    ranks = {
        "pipeline": {(0,)},  # the second stage has seen nothing
        "fsdp2_tensor_parallel": {(1, 3), (0, 1, 2, 3)},  # up is sharded over tp, and one of its ranks is bad
    }
    if row in ranks:
        assert set(found.values()) == ranks[row]
    elif row != "fsdp1":  # whose shards are pieces of the flat parameter
        assert set(found.values()) == {tuple(range(world))}
    return found


@on_ranks(2)
def test_shards_of_fsdp1(rank: int) -> dict[str, tuple[int, ...]]:
    spread = fsdp1()
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(1.0))
    spread.backward(1, bad=math.nan)
    found = clipper.find_nonfinite()
    held = {n.replace("_fsdp_wrapped_module.", "") for n, p in spread.model.named_parameters() if p.numel()}
    for name, ranks in found.items():
        assert rank not in ranks or name.replace("_fsdp_wrapped_module.", "") in held
    return found


def test_a_norm_beyond_float64_and_long_lists() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    p.grad = torch.full_like(p, 1.7e308)
    clipper = distclip.Clipper(p, distclip.GlobalNorm(1.0), on_nonfinite="raise")
    with pytest.raises(distclip.NonFiniteError, match="every element is finite: it is their power sum"):
        clipper.clip()
    said = say_where({f"p{i}": (i,) for i in range(9)})
    assert said.endswith("'p4' on rank(s) 4, and 4 more (clipper.find_nonfinite())")
