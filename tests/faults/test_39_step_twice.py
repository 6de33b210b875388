"""A line left over behind ``clipper.step()``: the same gradients would be stepped with twice."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.harness import on_ranks
from tests.step.spread import built, loss_of, model

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, 0.1),
    "Adam": lambda params: torch.optim.Adam(params, foreach=False),
    "fused AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, foreach=False),
}
Call = Callable[[torch.optim.Optimizer, GradScaler], Any]
LEFT_OVER: dict[str, tuple[Call, str]] = {
    "optimizer.step()": (lambda o, s: o.step(), "delete the line optimizer.step"),
    "optimizer.step(None)": (lambda o, s: o.step(None), "delete the line optimizer.step"),
    "optimizer.step(closure=None)": (lambda o, s: o.step(closure=None), "delete the line optimizer.step"),
    "scheduled": (
        lambda o, s: (torch.optim.lr_scheduler.StepLR(o, 1), o.step()),
        "delete the line optimizer.step",
    ),
    "scaler.step(optimizer)": (lambda o, s: s.step(o), "Delete the lines scaler.unscale_"),
    "scaler.unscale_(optimizer)": (lambda o, s: s.unscale_(o), "Delete the lines scaler.unscale_"),
    "scaler.update()": (lambda o, s: s.update(), "Delete the line scaler.update"),
    "a scaler that is off": (
        lambda o, s: GradScaler("cpu", enabled=False).step(o),
        "delete the line optimizer.step",
    ),
}


def backward(net: nn.Module, scaler: GradScaler | None = None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, 4, 8, generator=generator).unbind()
    loss = loss_of(net(x), target)
    (loss if scaler is None else scaler.scale(loss)).backward()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def steps_of(optimizer: torch.optim.Optimizer) -> float:
    return float(next(iter(optimizer.state.values()))["step"])


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("call", LEFT_OVER)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_39_left_over_behind_the_step(kind: str, call: str, skips: bool) -> None:
    """Refused before a parameter moves, also behind a step that was skipped; and the loop can go on."""
    net = model()
    opt, scaler = OPTIMIZERS[kind](net.parameters()), GradScaler("cpu", init_scale=4.0)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    left_over, says = LEFT_OVER[call]
    for seed in range(2):
        opt.zero_grad()
        backward(net, scaler, seed)
        if skips:
            next(net.parameters()).grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
        clipper.step(opt, scaler)
        was, scale, tracker = values(net), scaler.get_scale(), scaler._get_growth_tracker()
        with pytest.raises(ValueError, match=says):
            left_over(opt, scaler)
        assert all(torch.equal(a, b) for a, b in zip(values(net), was, strict=True))
        assert (scaler.get_scale(), scaler._get_growth_tracker()) == (scale, tracker)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("deferred", [False, True])
def test_39_without_a_scaler(kind: str, deferred: bool) -> None:
    if deferred and "fused" not in kind:
        return
    net = model()
    opt = OPTIMIZERS[kind](net.parameters())
    options: dict[str, Any] = {"apply": "deferred"} if deferred else {}
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5), **options)
    for max_norm in range(3):
        backward(net, seed=max_norm)
        clipper.step(opt)
        with pytest.raises(ValueError, match=r"delete the line optimizer\.step"):
            opt.step()
        if max_norm == 1:
            opt.zero_grad(set_to_none=False)


# --- what is meant so ------------------------------------------------------------------------------------


def legit_closure(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    def closure() -> float:
        opt.zero_grad()
        backward(net)
        return 0.0

    opt.step(closure)
    clipper.step(opt)
    opt.step(closure=closure)


def legit_new_gradients(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    opt.zero_grad()
    backward(net, seed=1)
    opt.step()


def legit_accumulated(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    backward(net, seed=1)
    opt.step()


def legit_changed_in_place(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """A second use of the gradients that is meant: noise is added, say."""
    for p in net.parameters():
        p.grad.add_(0.1)  # type: ignore[union-attr]
    opt.step()


def legit_zeros(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """Weight decay and momentum go on without gradients."""
    opt.zero_grad(set_to_none=False)
    opt.step()


def legit_part(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """A backward pass through one layer only, the last."""
    list(net.parameters())[-1].sum().backward()
    opt.step()


def legit_nothing(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    opt.zero_grad()
    opt.step()


def legit_clip(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    for seed in range(3):
        opt.zero_grad()
        backward(net, seed=seed)
        clipper.clip()
        opt.step()


def legit_another_optimizer(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    torch.optim.SGD(net.parameters(), 0.1).step()


def legit_copies(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """They step other parameters, by themselves; and the hook does not keep them from being made."""
    other, theirs = copy.deepcopy((net, opt))
    backward(other)
    theirs.step()
    again = pickle.loads(pickle.dumps(opt))
    again.step()
    copy.deepcopy(clipper.strategy)


def legit_dead_clipper(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    other = distclip.Clipper(net, distclip.GlobalNorm(0.1))
    opt.zero_grad()
    backward(net, seed=2)
    other.step(opt)
    hooks = len(opt._optimizer_step_pre_hooks)  # type: ignore[attr-defined]
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None
    assert len(opt._optimizer_step_pre_hooks) == hooks - 1  # type: ignore[attr-defined]
    opt.step()


def legit_two_clippers(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """In turn on one optimizer."""
    other = distclip.Clipper(net, distclip.GlobalNorm(0.1))
    for seed in range(4):
        opt.zero_grad()
        backward(net, seed=seed)
        (other if seed % 2 else clipper).step(opt)


def legit_outer(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    """An optimizer that steps another."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    outer = Outer(torch.optim.SGD(net.parameters(), 0.1))
    for seed in range(3):
        outer.zero_grad()
        backward(net, seed=seed)
        clipper.step(outer)


def legit_steps_of_both_kinds(net: nn.Module, opt: torch.optim.Optimizer, clipper: distclip.Clipper) -> None:
    for seed in range(4):
        opt.zero_grad(set_to_none=seed != 3)
        backward(net, seed=seed)
        opt.step() if seed % 2 else clipper.step(opt)
    opt.zero_grad()
    opt.step()
    clipper.step(opt)  # neither has any gradient


LEGIT = {name.removeprefix("legit_"): f for name, f in globals().items() if name.startswith("legit_")}


@pytest.mark.parametrize("kind", ["SGD", "fused AdamW"])
@pytest.mark.parametrize("use", LEGIT)
def test_39_what_is_meant_so(use: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    opt = OPTIMIZERS[kind](net.parameters())
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    backward(net)
    clipper.step(opt)
    with caplog.at_level(logging.WARNING, "distclip"):
        LEGIT[use](net, opt, clipper)
    assert not caplog.records


def test_39_torchs_order_in_the_next_iteration() -> None:
    net = model()
    opt, scaler = torch.optim.SGD(net.parameters(), 0.1), GradScaler("cpu", init_scale=4.0)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    for seed in range(4):
        opt.zero_grad()
        backward(net, scaler, seed)
        if seed % 2:
            scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        else:
            clipper.step(opt, scaler)
            for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
                assert other.get_scale() == scaler.get_scale()
                with pytest.raises(AssertionError, match="scale"):
                    other.update()  # torch's own word
    scaler.update(8.0)
    assert scaler.get_scale() == 8.0


def test_39_the_clippers_step_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Said once: CUDA graphs change gradients without a trace, so that it may be meant."""
    net = model()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    backward(net)
    for _ in range(3):
        clipper.step(opt)
    assert [r.getMessage()[:50] for r in caplog.records] == [
        "clipper.step() was called twice with the same grad"
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_39_a_step_before_the_clippers(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Noticed when it has been taken: said once, from the second iteration on."""
    net = model()
    opt = OPTIMIZERS[kind](net.parameters())
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    for seed in range(4):
        opt.zero_grad()
        backward(net, seed=seed)
        opt.step()
        clipper.step(opt)
    assert [r.getMessage()[:57] for r in caplog.records] == [
        "optimizer.step() was called before clipper.step(optimizer"
    ]
    assert "Delete the line optimizer.step()" in caplog.text


def test_39_no_gradient_is_kept_alive() -> None:
    net = model()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    backward(net)
    clipper.step(opt)
    gradients = [weakref.ref(p.grad) for p in net.parameters()]  # type: ignore[arg-type]
    opt.zero_grad()
    gc.collect()
    assert not any(reference() is not None for reference in gradients)
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("row", ["ddp", "fsdp2", "fsdp1"])
@on_ranks(2)
def test_39_on_every_rank(rank: int, row: str) -> str:
    spread = built(row)
    opt = torch.optim.SGD(spread.model.parameters(), 0.1, foreach=False)
    clipper = distclip.Clipper(spread.model, distclip.GlobalNorm(0.5))
    said = ""
    for seed in range(3):
        opt.zero_grad()
        spread.backward(seed)
        clipper.step(opt)
        try:
            opt.step()
        except ValueError as error:
            said += str(error)[:60]
    opt.zero_grad()
    spread.backward(9)
    opt.step()
    assert said.count("was called again") == 3
    return said


@on_ranks(2)
def test_39_zero_redundancy(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch imports what it has deprecated
        from torch.distributed.optim import ZeroRedundancyOptimizer
    net = DistributedDataParallel(model())
    opt = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.1)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    for seed in range(3):
        opt.zero_grad()
        backward(net, seed=seed)
        clipper.step(opt)
        with pytest.raises(ValueError, match="delete the line"):
            opt.step()
