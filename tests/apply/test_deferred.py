"""apply="deferred": a fused optimizer takes the coefficient along; clipping has no pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from tests.counting import count_host_syncs
from tests.harness import on_row
from tests.step.passes import count_bytes
from tests.step.spread import (
    DEFERRING,
    OPTIMIZERS,
    ROWS,
    SCALERS,
    Spread,
    batch,
    built,
    kind,
    loss_of,
    single,
    unchanged,
)

SHOWN = {name: ROWS[name] for name in ("single", "ddp", "fsdp1", "fsdp2")}
ON_DTENSORS = ("Adam", "AdamW")  # torch has no rule for its fused SGD and Adagrad there
STEPS = 50


def trained(row: str, optimizer: str, scaler: str, apply: Any) -> tuple[Spread, list[float], float]:
    """Spread after 50 steps, the norms on the way, and how many of the steps were clipped."""
    spread, sc = built(row), SCALERS[scaler](init_scale=2.0**8, growth_interval=7)
    opt = OPTIMIZERS[optimizer](spread.groups(), **kind(fused=True))
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(4.0), apply=apply)
    norms, clipped = [], 0.0
    for seed in range(STEPS):
        opt.zero_grad()
        spread.backward(seed % 10, sc.scale if sc else unchanged)
        report = clipper.step(opt, sc)
        norms.append(report.total_norm.item())
        clipped += report.clipped.item()
    return spread, norms, clipped


@pytest.mark.parametrize("scaler", ["no scaler", "GradScaler"])
@pytest.mark.parametrize("optimizer", DEFERRING)
@on_row(SHOWN)
def test_trains_as_in_place(row: str, optimizer: str, scaler: str) -> float:
    """In place in one process, which ``test_table`` compares with the other placements."""
    if row == "fsdp2" and optimizer not in ON_DTENSORS:
        # Not a limit of ours. To be seen when torch learns it: then the row above holds.
        # (2.10 says it in other words, and 2.8 runs into the limit of recursion.)
        words = "does not have a sharding strategy|found no DeviceMesh from dtensor args|recursion depth"
        with pytest.raises((NotImplementedError, RuntimeError), match=words):
            trained(row, optimizer, scaler, "deferred")
        return 0.0
    deferred, norms, clipped = trained(row, optimizer, scaler, "deferred")
    in_place, want, _ = trained("single", optimizer, scaler, "inplace")
    assert 0.2 * STEPS < clipped <= STEPS
    assert norms == pytest.approx(want, rel=1e-4)
    expected = in_place.whole()
    for name, got in deferred.whole().items():
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5)
    return clipped


def wide() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 8))


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("optimizer", DEFERRING)
def test_one_read_for_the_norm_and_nothing_else(optimizer: str, scaler: str) -> None:
    """Counted by the bytes of gradients that every dispatched operator reads and writes, the optimizer's own
    pass left out; and not a single host sync, scaler.update() included where torch has none in it."""
    net, sc = wide(), SCALERS[scaler](init_scale=2.0**8)
    opt = OPTIMIZERS[optimizer](net.parameters(), fused=True)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5), apply="deferred")
    for step in range(3):
        opt.zero_grad()
        x, target = batch(step)
        loss = loss_of(net(x), target)
        (sc.scale(loss) if sc else loss).backward()  # type: ignore[union-attr]
        with count_bytes(net.parameters()) as passes, count_host_syncs() as syncs:
            report = clipper.step(opt, sc)
        assert report.clipped.item()
        if step:  # SGD's first step has to look whether it is one
            assert passes.beside_optimizer == (1.0, 0.0)
            # ShardedGradScaler.update() looks at its flag and its counter where these are on the CPU.
            assert syncs.count == (2 if scaler == "ShardedGradScaler" else 0)


# --- what it cannot do ---------------------------------------------------------------------------------


def stepped(strategy: distclip.Strategy, opt: Any = None, **kwargs: Any) -> list[Tensor]:
    spread = single()
    opt = opt or (lambda params: torch.optim.AdamW(params, fused=True))
    clipper = distclip.Clipper(spread.model, strategy, apply="deferred", **kwargs)
    spread.backward(1)
    before = [t.detach().clone() for p in spread.model.parameters() for t in (p, p.grad) if t is not None]
    try:
        clipper.step(opt(spread.model.parameters()))
    finally:
        after = [t.detach() for p in spread.model.parameters() for t in (p, p.grad) if t is not None]
        untouched = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not untouched
    return after


def test_an_optimizer_that_does_not_take_it() -> None:
    for name, optimizer in {
        "SGD": torch.optim.SGD,
        "AdamW": torch.optim.AdamW,
        "RMSprop": torch.optim.RMSprop,
    }.items():
        with pytest.raises(ValueError, match=f"which {name} does not take: use Adam.*fused=True"):
            stepped(distclip.GlobalNorm(0.5), optimizer)


@pytest.mark.parametrize(
    "strategy",
    [
        distclip.Value(0.1),
        distclip.PerParameter(0.1),
        distclip.PerGroup({"*": 0.1}),
        distclip.AdaGC(),
        distclip.Chain(distclip.GlobalNorm(0.5), distclip.Value(0.1)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_strategy_without_one_coefficient(strategy: distclip.Strategy) -> None:
    if isinstance(strategy, distclip.AdaGC):
        strategy = distclip.AdaGC(warmup=0)
    with pytest.raises(ValueError, match="needs a strategy with one coefficient for all gradients"):
        stepped(strategy)


@pytest.mark.parametrize(
    "strategy",
    [distclip.GlobalNorm(0.5), distclip.Percentile(initial=0.5), distclip.ZClip(), distclip.SkipSpikes()],
    ids=lambda s: type(s).__name__,
)
def test_a_strategy_with_one(strategy: distclip.Strategy) -> None:
    stepped(strategy)


def test_zero_and_clip() -> None:
    with pytest.raises(ValueError, match='policy other than on_nonfinite="zero"'):
        stepped(distclip.GlobalNorm(0.5), on_nonfinite="zero")
    clipper = distclip.Clipper(single().model, distclip.GlobalNorm(0.5), apply="deferred")
    with pytest.raises(ValueError, match=r"call clipper.step\(optimizer\)"):
        clipper.clip()
    with pytest.raises(ValueError, match="apply='later'"):
        distclip.Clipper(single().model, distclip.GlobalNorm(0.5), apply="later")  # type: ignore[arg-type]
