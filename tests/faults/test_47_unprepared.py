"""Failure 47: Accelerate, and an optimizer that it has not prepared, or that is none of torch's.

The report said that a step was skipped, and the weights became NaN. Right is: the step is left out, whoever
takes it, and Accelerate hears of it; or an error at the clip that names what is not prepared.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import distclip
from distclip.integrations.accelerate import Installed, install
from tests.harness import on_ranks
from tests.integrations.accelerators import Job, accelerator

MAX_NORM = 0.25
SCALE = 2.0**10


class Wrapper:
    """An optimizer that is none of torch's, around one that is, with a state of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.steps = base, 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        self.base.step()

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


class Groupless(Wrapper):
    """One that keeps its groups to itself."""

    param_groups = property(None)  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "param_groups":
            raise AttributeError(name)
        return super().__getattribute__(name)


class ScheduleFree(Wrapper):
    """As schedulefree's ``ScheduleFreeWrapper`` does it, the weights move outside of the base's step too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in weights]
        super().step()
        for p, old in zip(weights, before, strict=True):
            p.lerp_(old, 0.1 / self.steps)
            p.mul_(0.999)


class ByHand:
    """One that changes ``.data``, and calls no optimizer of torch."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=0.1)

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SkipAbove(distclip.Strategy):
    def forward(self, norms: Any) -> distclip.Scale:
        one = torch.ones_like(norms.total)
        coefficient = torch.clamp(MAX_NORM / norms.total, max=1.0)
        return distclip.Scale(coefficient, MAX_NORM * one, skip=norms.total > 1000)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


class Script:
    """A training script: what it steps, and when the optimizer comes."""

    def __init__(self, a: Accelerator, strategy: Any, **options: Any) -> None:
        self.a, self.model = a, net()
        self.optimizers: list[Any] = []
        self.handle: Installed | None = None
        self._strategy, self._options = strategy, options
        self.parts = [list(self.model.parameters())]

    def install(self) -> None:
        self.handle = install(self.a, self._strategy, **self._options)

    def prepare(self, make: Callable[[Any], Any] = sgd, what: Any = None) -> Any:
        if what is None:
            what = self.model.parameters()
        if self.model not in self.a._models:
            self.model = self.a.prepare(self.model)
        optimizer = self.a.prepare(make(what))
        self.optimizers.append(optimizer)
        return optimizer

    def clip(self, factor: float = 1.0) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
        # Factor of the first layer's gradients only, as one part of the model explodes.
        first = sum(p.square().sum() for p in self.model[0].parameters())
        self.a.backward(self.model(x).square().mean() * 10 + first * factor)
        for part in self.parts:
            self.a.clip_grad_norm_(part, 1.0)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def of_torch(make: Callable[[Any], Any]) -> Callable[[Script], None]:
    def setup(s: Script) -> None:
        s.install()
        s.prepare(make)

    return setup


def before_install(s: Script) -> None:
    s.prepare(adamw)
    s.install()


def after_the_first_clip(s: Script) -> None:
    s.install()
    s.a.backward(s.model(torch.ones(1, 4)).sum())
    s.a.clip_grad_norm_(s.parts[0], math.inf)  # measures, for which no optimizer is needed
    s.prepare(adamw)


def the_raw_one_is_stepped(s: Script) -> None:
    s.install()
    raw = adamw(s.model.parameters())
    s.prepare(lambda _: raw)
    s.optimizers = [raw]


def two_prepared(s: Script) -> None:
    s.install()
    s.prepare(sgd, s.model[0].parameters())
    s.prepare(adamw, s.model[2].parameters())


def one_of_two_prepared(s: Script) -> None:
    s.install()
    s.prepare(sgd, s.model[2].parameters())
    s.optimizers.append(adamw(s.model[0].parameters()))


def one_of_two_in_a_raw_wrapper(s: Script) -> None:
    s.install()
    s.prepare(sgd, s.model[2].parameters())
    s.optimizers.append(Wrapper(adamw(s.model[0].parameters())))


def replaced_by_a_raw_one(s: Script) -> None:
    of_torch(sgd)(s)
    s.clip()
    s.step()
    s.optimizers = [adamw(s.model.parameters())]


def replaced_by_a_prepared_one(s: Script) -> None:
    of_torch(sgd)(s)
    s.clip()
    s.step()
    s.optimizers = []
    s.prepare(adamw)


def in_parts(s: Script) -> None:
    """Of one optimizer, whose last part is fine."""
    s._strategy = SkipAbove
    s.install()
    s.prepare(adamw)
    s.parts = [list(s.model[0].parameters()), list(s.model[2].parameters())]


def around_a_prepared_one(s: Script) -> None:
    s.install()
    s.prepare(adamw)
    s.optimizers = [Wrapper(s.optimizers[0])]


def wrapped(kind: Any, make: Callable[[Any], Any] = sgd) -> Callable[[Script], None]:
    def setup(s: Script) -> None:
        s.install()
        s.optimizers = [s.a.prepare_optimizer(kind(make(s.model.parameters())))]

    return setup


def by_hand(s: Script) -> None:
    s.install()
    s.optimizers = [s.a.prepare_optimizer(ByHand(s.model.parameters()))]


SKIPPED: dict[str, Callable[[Script], None]] = {
    "SGD": of_torch(sgd),
    "AdamW": of_torch(adamw),
    "fused AdamW": of_torch(fused),
    "fused SGD with momentum": of_torch(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, fused=True)),
    "prepared before install": before_install,
    "prepared after the first clip": after_the_first_clip,
    "prepared, and the raw one stepped": the_raw_one_is_stepped,
    "two, prepared": two_prepared,
    "two, one prepared": one_of_two_prepared,
    "two, one prepared, one in a raw wrapper": one_of_two_in_a_raw_wrapper,
    "replaced by a raw one": replaced_by_a_raw_one,
    "replaced by a prepared one": replaced_by_a_prepared_one,
    "clipped in parts": in_parts,
    "a raw wrapper of a prepared one": around_a_prepared_one,
    "a prepared wrapper": wrapped(Wrapper, adamw),
    "a prepared wrapper of a fused one": wrapped(Wrapper, fused),
    "a prepared wrapper that moves weights": wrapped(ScheduleFree),
    "a prepared wrapper without groups": wrapped(Groupless),
    "a prepared optimizer by hand": by_hand,
}
BAD = {"nan": math.nan, "spike": 1e8}
OPTIONS: dict[str, dict[str, Any]] = {"nan": {}, "spike": {"on_nonfinite": "propagate"}}


# A scaler wants groups, and optimizers that are prepared.
SCALED = [
    row for row in SKIPPED if not re.search("without groups|raw|after the first clip|one prepared", row)
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("row", "fp16"), [(row, None) for row in SKIPPED] + [(row, SCALE) for row in SCALED[::2]]
)
def test_47_a_step_is_left_out_whoever_takes_it(row: str, fp16: float | None, bad: str) -> None:
    with accelerator("single", fp16=fp16) as a:
        s = Script(a, SkipAbove(), **OPTIONS[bad])
        SKIPPED[row](s)
        assert s.handle is not None
        moved = []
        for skips in (False, True, False, False):
            before = s.weights()
            s.clip(BAD[bad] if skips else 1.0)
            gradients = [p.grad for p in s.model.parameters()]
            s.step()
            assert all(p.grad is g for p, g in zip(s.model.parameters(), gradients, strict=True))
            after = s.weights()
            assert all(bool(w.isfinite().all()) for w in after)
            moved.append([not torch.equal(w, b) for w, b in zip(after, before, strict=True)])
            if a._optimizers and s.optimizers[0] in a._optimizers:
                assert s.optimizers[0].step_was_skipped == skips
                assert a.optimizer_step_was_skipped == skips
            if row != "clipped in parts":
                assert bool(s.handle.report.skipped) == skips  # type: ignore[union-attr]
        assert moved == [[True] * 4, [False] * 4, [True] * 4, [True] * 4]
        assert s.handle.report.clipped  # type: ignore[union-attr]
        if fp16:
            halved = len(s.optimizers) if bad == "nan" else 0  # Accelerate updates it after each of them
            assert a.scaler.get_scale() == SCALE / 2**halved


def raw(s: Script) -> None:
    s.install()
    s.optimizers = [sgd(s.model.parameters())]


def wrapper_through_prepare(s: Script) -> None:
    """``prepare`` hands it back as it is."""
    s.install()
    s.prepare(lambda ps: Wrapper(sgd(ps)))


def raw_by_hand(s: Script) -> None:
    s.install()
    s.optimizers = [ByHand(s.model.parameters())]


def of_another_model(s: Script) -> None:
    other = net()
    s.install()
    s.optimizers = [s.a.prepare(sgd(other.parameters()))]


REFUSED = {
    "raw": (raw, "SGD does"),
    "a wrapper through prepare": (wrapper_through_prepare, "SGD, Wrapper do"),
    "by hand": (raw_by_hand, "ByHand does"),
    "of another model": (of_another_model, "shape .4, 4. and 3 more"),
}


@pytest.mark.parametrize("fp16", [None, SCALE], ids=["", "fp16"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("row", REFUSED)
def test_47_what_is_not_prepared_is_named(row: str, bad: str, fp16: float | None) -> None:
    setup, words = REFUSED[row]
    with accelerator("single", fp16=fp16) as a:
        s = Script(a, SkipAbove(), **OPTIONS[bad])
        setup(s)
        before = s.weights()
        with pytest.raises(ValueError, match=rf"(?s)accelerator has prepared.*{words}.*accelerator\.prepare"):
            s.clip(BAD[bad])
        assert all(torch.equal(w, b) for w, b in zip(s.weights(), before, strict=True))


@pytest.mark.parametrize("how", ["norm", "value", "measure"])
def test_47_scaled_gradients_that_nobody_unscales(how: str) -> None:
    """Also without a strategy: Accelerate clips 1024 times too little there, in silence."""
    with accelerator("single", fp16=SCALE) as a:
        s = Script(a, None)
        raw(s)
        a.backward(s.model(torch.ones(1, 4)).sum())
        clip = a.clip_grad_value_ if how == "value" else a.clip_grad_norm_
        with pytest.raises(ValueError, match="would stay multiplied by the loss scale"):
            clip(s.parts[0], math.inf if how == "measure" else 1.0)


def test_47_nothing_to_skip_needs_no_optimizer() -> None:
    """As a drop-in, without a scaler: any parameters, by whatever trained."""
    with accelerator("single") as a:
        s = Script(a, None)
        raw(s)
        s.clip(1e6)
        assert s.handle is not None
        assert s.handle.report is not None
        assert s.handle.report.clipped
        s.handle.remove()
        s = Script(a, distclip.GlobalNorm(1.0), on_nonfinite="raise")
        raw(s)
        s.clip(1e6)


@pytest.mark.parametrize("row", ["two, one prepared", "two, one prepared, one in a raw wrapper"])
def test_47_a_part_that_is_not_prepared_is_said_once(row: str, caplog: pytest.LogCaptureFixture) -> None:
    with accelerator("single") as a, caplog.at_level(logging.WARNING, "distclip"):
        s = Script(a, SkipAbove())
        SKIPPED[row](s)
        for _ in range(3):
            s.clip()
            s.step()
    (said,) = [r.getMessage() for r in caplog.records]
    assert "holds '0.weight' and 1 more of the parameters that are clipped (AdamW" in said
    assert "accelerator.prepare" in said


def test_47_lbfgs() -> None:
    with accelerator("single") as a:
        s = Script(a, distclip.GlobalNorm(0.1))
        of_torch(torch.optim.LBFGS)(s)
        with pytest.raises(ValueError, match=r"LBFGS runs backward several times.*on_nonfinite='raise'"):
            s.clip()
        assert s.handle is not None
        s.handle.remove()
        install(a)  # as Accelerate has it: the line search sees clipped gradients
        before = s.weights()

        def closure() -> Tensor:
            s.optimizers[0].zero_grad()
            loss = s.model(torch.ones(1, 4)).square().sum()
            a.backward(loss)
            a.clip_grad_norm_(s.model.parameters(), 0.1)
            return loss

        s.optimizers[0].step(closure)
        assert not torch.equal(s.weights()[0], before[0])


# --- Accelerate hears of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("fp16", [None, SCALE], ids=["", "fp16"])
@pytest.mark.parametrize("make", [sgd, fused])
@pytest.mark.parametrize("bad", BAD)
def test_47_the_schedule_waits(make: Any, bad: str, fp16: float | None) -> None:
    with accelerator("single", fp16=fp16) as a:
        s = Script(a, SkipAbove(), **OPTIONS[bad])
        optimizer = make(s.model.parameters())
        inner = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        s.model, optimizer, schedule = a.prepare(s.model, optimizer, inner)
        s.optimizers, rates = [optimizer], []
        s.install()
        for factor in (1.0, BAD[bad], 1.0):
            s.clip(factor)
            s.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0] / 0.1)
        assert rates == pytest.approx([1 / 2, 1 / 2, 1 / 3])


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_47_all_ranks_skip_and_say_so(rank: int, kind: str) -> None:
    """A NaN on one of them."""
    with accelerator(kind) as a:
        job = Job(a, kind, torch.optim.AdamW)
        install(a, SkipAbove())
        for seed, bad in enumerate([None, math.nan, None]):
            before = job.whole()
            job.backward(seed, bad=bad)
            a.clip_grad_norm_(job.model.parameters(), 1.0)
            job.optimizer.step()
            assert a.optimizer_step_was_skipped == (bad is not None)
            for name, weight in job.whole().items():
                assert torch.equal(weight, before[name]) == (bad is not None), name
            job.optimizer.zero_grad()


@on_ranks(2)
def test_47_all_ranks_are_told(rank: int) -> None:
    with accelerator("ddp") as a:
        model = a.prepare(net())
        install(a, distclip.GlobalNorm(1.0))
        optimizer = sgd(model.parameters())
        a.backward(model(torch.ones(1, 4)).sum())
        with pytest.raises(ValueError, match=r"holds 'module.0.weight|holds '0.weight") as told:
            a.clip_grad_norm_(model.parameters(), 1.0)
        assert "(SGD does)" in str(told.value)
        del optimizer


# --- copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["AdamW", "a prepared wrapper", "fused AdamW"])
@pytest.mark.parametrize("fp16", [None, SCALE], ids=["", "fp16"])
@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_47_copies_are_plain(row: str, fp16: float | None, how: str) -> None:
    """Pickles of an accelerator, and of what it has prepared, after steps that were skipped."""
    with accelerator("single", fp16=fp16) as a:
        s = Script(a, SkipAbove())
        SKIPPED[row](s)
        for factor in (1.0, math.nan):
            s.clip(factor)
            s.step()
        duplicate = {
            "pickle": lambda x: pickle.loads(pickle.dumps(x)),
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
        }[how]
        again = duplicate(a)
        if how == "deepcopy":  # Accelerate's own gives the same object
            assert again is a
        else:
            assert not {"clip_grad_norm_", "backward", "_distclip", "__getstate__"} & set(vars(again))
            assert not again._save_model_state_pre_hook
            assert not again._load_model_state_pre_hook
        if how == "pickle":  # a shallow copy shares its optimizers and its scaler
            model = net()
            model, _ = again.prepare(model, sgd(model.parameters()))
            again.backward(model(torch.ones(1, 4)).sum())
            norm = again.clip_grad_norm_(model.parameters(), 0.1)
            total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))  # type: ignore
            assert total == pytest.approx(0.1, rel=1e-3)
            assert norm > 0.1
            install(again, SkipAbove()).remove()
        optimizer = duplicate(s.optimizers[0])
        assert optimizer.step_was_skipped
        assert type(optimizer).step in (getattr(optimizer.step, "__func__", None), type(optimizer).step)
        s.clip()  # the accelerator itself still has it
        assert s.handle is not None
        s.step()
        assert not a.optimizer_step_was_skipped
        assert a._save_model_state_pre_hook
