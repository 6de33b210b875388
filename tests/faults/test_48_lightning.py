"""Failure 48: Lightning, and steps that pass it by: raw optimizers, a module's own ``optimizer_step``.

Nothing was clipped, and ``report`` stayed None. Right is the norm of float64, as a loop of torch's own has
it; or an error. Beside it what several optimizers in one module need.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader

import distclip
from distclip.integrations.lightning import ClipGradients
from tests import oracle
from tests.harness import on_ranks
from tests.integrations.test_lightning import Reports, guest, pytestmark, scaled

BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) * (1 + i % 3) for i in range(4)]
BAD = torch.full((4, 6), math.nan)
BOUND = 0.05
__all__ = ["pytestmark"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, fused=True)


class Automatic(pl.LightningModule):
    make: Callable[[Any], torch.optim.Optimizer] = staticmethod(sgd)

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def optimizer(self) -> Any:
        return self.optimizers(use_pl_optimizer=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizer().zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizer().step()


class InsideLightnings(Manual):
    def optimizer(self) -> Any:
        return self.optimizers().optimizer  # type: ignore[union-attr]


class OwnBackward(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizer().zero_grad()
        self.loss(batch).backward()
        self.optimizer().step()


class WithClosure(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        def closure() -> Tensor:
            self.optimizer().zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        assert self.optimizer().step(closure).isfinite() == batch.isfinite().all()


class ClosureByName(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        def closure() -> None:
            self.optimizer().zero_grad()
            self.manual_backward(self.loss(batch))

        self.optimizer().step(closure=closure)


class OfItsOwn(Manual):
    """Of which Lightning is not told."""

    def configure_optimizers(self) -> Any:
        self.own = self.make(self.net.parameters())

    def optimizer(self) -> Any:
        return self.own


class Around(torch.optim.Optimizer):
    """An optimizer around another, both of torch's kind."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Wrapped(Manual):
    def configure_optimizers(self) -> Any:
        return Around(self.make(self.net.parameters()))


class RawStep(Automatic):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.optimizer.step(optimizer_closure)


class ClosureFirst(Automatic):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        optimizer.step()


class ClosureFirstThenRaw(Automatic):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class AsDocumented(Automatic):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] *= 1.0


ROWS: list[type[Automatic]] = [
    Manual, InsideLightnings, OwnBackward, WithClosure, ClosureByName, OfItsOwn, Wrapped,
    RawStep, ClosureFirst, ClosureFirstThenRaw, AsDocumented,
]  # fmt: skip


def fit(
    model: pl.LightningModule, *callbacks: pl.Callback, batches: Any = None, **options: Any
) -> pl.Trainer:
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False} | options
    trainer = pl.Trainer(
        callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(BATCHES if batches is None else batches, batch_size=None))
    return trainer


def hooks_left() -> list[Any]:
    """Of Lightning's integration (an accelerator's live as long as it), on every optimizer there is."""
    both = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    return [h for hooks in both for h in hooks.values() if h.__module__ == ClipGradients.__module__]


def run(model: pl.LightningModule, strategy: Any = None, **options: Any) -> tuple[ClipGradients, Reports]:
    clip = ClipGradients(strategy or distclip.GlobalNorm(BOUND))
    reports = Reports(clip)
    fit(model, clip, reports, **options)
    assert not hooks_left()
    return clip, reports


def by_hand(make: Any, batches: list[Tensor]) -> tuple[list[Tensor], list[float]]:
    """A loop of torch's own, which leaves out what is not finite."""
    model = net()
    optimizer, norms = make(model.parameters()), []
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        norms.append(oracle.norm(oracle.dense_gradients(model.parameters())))
        torch.nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        if math.isfinite(norms[-1]):
            optimizer.step()
    return list(model.parameters()), norms


def assert_equal(a: Any, b: Any, rel: float = 1e-5, absolute: float = 1e-7) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rel, atol=absolute)


@pytest.mark.parametrize("make", [sgd, fused])
@pytest.mark.parametrize("kind", ROWS)
def test_48_whoever_steps(kind: type[Automatic], make: Any) -> None:
    batches = [*BATCHES[:2], BAD, *BATCHES[2:]]
    weights, norms = by_hand(make, batches)
    assert min(n for n in norms if math.isfinite(n)) > 4 * BOUND
    model = kind()
    model.make = make
    clip, reports = run(model, batches=batches)
    assert reports.norms == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert [bool(r.skipped) for r in reports.seen] == [not math.isfinite(n) for n in norms]
    assert [logged["clip/skipped"] for logged in reports.logged] == [0, 0, 1, 0, 0]
    assert_equal(model.net.parameters(), weights)
    assert list(clip.clippers) == [0]


def test_48_the_gradients_come_back() -> None:
    """Of a step that is left out, by hiding them from an optimizer that is not fused."""
    seen = []

    class Looks(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            seen.append([p.grad is not None for p in self.net.parameters()])

    run(Looks(), batches=[BATCHES[0], BAD])
    assert seen == [[True] * 4] * 2


# --- with a loss scaler ----------------------------------------------------------------------------------


class ByScaler(Manual):
    """The scaler by hand, as torch's documentation has it."""

    unscales = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer, scaler = self.optimizer(), self.trainer.precision_plugin.scaler
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if self.unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


class ByScalerUnscaled(ByScaler):
    unscales = True


class UnscaledAndRaw(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer, scaler = self.optimizer(), self.trainer.precision_plugin.scaler
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()


class ByScalerLightnings(ByScaler):
    def optimizer(self) -> Any:
        return self.optimizers()


@pytest.mark.parametrize("make", [sgd, fused])
@pytest.mark.parametrize(
    "kind", [ByScaler, ByScalerUnscaled, ByScalerLightnings, UnscaledAndRaw, ClosureFirst]
)
def test_48_a_scaler_by_hand(kind: type[Automatic], make: Any) -> None:
    weights, norms = by_hand(make, BATCHES)
    model = kind()
    model.make = make
    options = scaled(2.0**4)
    _, reports = run(model, **options)
    # The forward pass is one of float16.
    assert reports.norms == pytest.approx(norms, rel=0.02)
    assert_equal(model.net.parameters(), weights, rel=0.05, absolute=1e-3)
    assert options["plugins"][0].scaler.get_scale() == 2.0**5  # after three of four steps
    assert not {"scale", "step"} & set(vars(options["plugins"][0].scaler))


@pytest.mark.parametrize("kind", [Manual, InsideLightnings, OfItsOwn, RawStep, WithClosure])
def test_48_scaled_gradients_are_refused(kind: type[Automatic]) -> None:
    options = scaled()
    with pytest.raises(ValueError, match=r"SGD\.step\(\) was called past Lightning, with gradients that are"):
        run(kind(), **options)
    assert not hooks_left()
    assert not {"scale", "step"} & set(vars(options["plugins"][0].scaler))
    assert "optimizer_step" not in vars(options["plugins"][0])


def test_48_what_cannot_be_is_explained() -> None:
    class Lbfgs(Manual):
        make = staticmethod(lambda ps: torch.optim.LBFGS(ps))

    class Both(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            self.optimizers().step()  # type: ignore[union-attr]
            self.optimizer().step()  # left over

    model = Manual()
    model.make = fused
    with pytest.raises(ValueError, match=r'past Lightning.*apply="deferred"'):
        fit(model, ClipGradients(distclip.GlobalNorm(1.0), apply="deferred"))
    with pytest.raises(ValueError, match="LBFGS runs backward several times"):
        fit(Lbfgs(), ClipGradients(distclip.GlobalNorm(1.0)))
    with pytest.raises(ValueError, match=r"SGD\.step\(\) was called again"):
        fit(Both(), ClipGradients(distclip.GlobalNorm(1.0)))
    assert not hooks_left()


def test_48_optimizers_of_something_else_are_let_be() -> None:
    other = nn.Parameter(torch.ones(3))

    class Beside(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            other.grad = torch.full((3,), 100.0)
            torch.optim.SGD([other], lr=1.0).step()
            super().training_step(batch, batch_idx)

    weights, norms = by_hand(sgd, BATCHES)
    model = Beside()
    _, reports = run(model)
    assert other.tolist() == [1.0 - 400.0] * 3
    assert reports.norms == pytest.approx(norms, rel=1e-5)
    assert_equal(model.net.parameters(), weights)


# --- several optimizers ----------------------------------------------------------------------------------


class Two(Manual):
    raw = True

    def configure_optimizers(self) -> Any:
        return [self.make(self.net[i].parameters()) for i in (0, 2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def two_by_hand(bounds: tuple[float, float]) -> tuple[list[Tensor], list[list[float]]]:
    model = net()
    optimizers, norms = [sgd(model[i].parameters()) for i in (0, 2)], []
    for batch in BATCHES:
        model.zero_grad()
        model(batch).square().mean().backward()
        norms.append([])
        for i, bound in zip((0, 2), bounds, strict=True):
            norms[-1].append(oracle.norm(oracle.dense_gradients(model[i].parameters())))
            torch.nn.utils.clip_grad_norm_(model[i].parameters(), bound)
        for optimizer in optimizers:
            optimizer.step()
    return list(model.parameters()), norms


def two(raw: bool) -> Two:
    model = Two()
    model.raw = raw
    return model


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("strategy", "bounds"),
    [
        (lambda: distclip.GlobalNorm(BOUND), (BOUND, BOUND)),
        (lambda: [distclip.GlobalNorm(BOUND), distclip.GlobalNorm(2 * BOUND)], (BOUND, 2 * BOUND)),
        (lambda: distclip.PerGroup({"net.0.*": BOUND, "net.2.*": 2 * BOUND}), (BOUND, 2 * BOUND)),
        (
            lambda: distclip.Chain(
                distclip.SkipSpikes(), distclip.PerGroup({"*.0.*": BOUND, "*.2.*": BOUND})
            ),
            (BOUND, BOUND),
        ),
    ],
    ids=["one for all", "one for each", "patterns", "patterns in a chain"],
)
def test_48_each_of_several_optimizers(strategy: Any, bounds: tuple[float, float], raw: bool) -> None:
    weights, norms = two_by_hand(bounds)
    model = two(raw)
    clip, reports = run(model, strategy())
    assert_equal(model.net.parameters(), weights)
    for logged, want in zip(reports.logged, norms, strict=True):
        assert [logged["clip/norm/0"], logged["clip/norm/1"]] == pytest.approx(want, rel=1e-5)
        assert "clip/norm" not in logged
        assert logged["clip/clipped/0"] == logged["clip/clipped/1"] == 1
    last = [clip.reports[i].total_norm.item() for i in range(2)]
    assert last == pytest.approx(norms[-1], rel=1e-5)


def test_48_as_many_strategies_as_optimizers() -> None:
    one = distclip.GlobalNorm(1.0)
    with pytest.raises(ValueError, match="3 strategies, and configure_optimizers returns 2 optimizers"):
        run(two(True), [one, distclip.GlobalNorm(1.0), distclip.GlobalNorm(1.0)])
    with pytest.raises(ValueError, match=r"'net\.7' fits none of the 4 parameters"):
        run(two(True), distclip.PerGroup({"*": 1.0, "net.7": 1.0}))
    with pytest.raises(ValueError, match=r"'net\.2\.\*' fits none of the 2 parameters"):
        run(two(True), [distclip.PerGroup({"net.2.*": 1.0}), one])
    with pytest.raises(TypeError, match="or a list of one for each optimizer"):
        ClipGradients([1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="or a list of one for each optimizer"):
        ClipGradients([])


class Adversarial(Manual):
    """Both backward passes first, then both steps."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.0) for i in (0, 2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(100 * self.net[0](batch).square().mean())
        self.manual_backward(100 * self.net[2](torch.ones(2, 5)).square().mean())
        first.step()
        second.step()


def test_48_one_scale_for_all_gradients_of_a_pass() -> None:
    """It would double with the step of the first, and the second be divided by twice the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    from lightning.pytorch.plugins.precision import MixedPrecision

    plain, mixed = (
        run(Adversarial(), **options)[1]
        for options in ({}, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]})
    )
    for a, b in zip(plain.logged, mixed.logged, strict=True):
        for i in range(2):
            assert b[f"clip/norm/{i}"] == pytest.approx(a[f"clip/norm/{i}"], rel=0.02)
    assert scaler.get_scale() == 4.0 * 2**4  # once for each batch


# --- the loss --------------------------------------------------------------------------------------------


class Judge(distclip.Strategy):
    uses_loss = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, norms: Any) -> distclip.Scale:
        self.seen.append(norms.loss.item())
        return distclip.Scale(torch.ones_like(norms.total), norms.total)


FITS: dict[str, tuple[type[Automatic], dict[str, Any], int]] = {
    "automatic": (Automatic, {}, 1),
    "accumulated": (Automatic, {"accumulate_grad_batches": 2}, 2),
    "manual": (Manual, {}, 1),
    "a closure": (WithClosure, {}, 1),
    "its own step": (RawStep, {}, 1),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", FITS)
def test_48_the_loss_is_judged(kind: str, mixed: bool) -> None:
    make, options, window = FITS[kind]
    if mixed and make is not Automatic:
        make = ByScaler
    judge, model = Judge(), make()
    model.make = lambda ps: torch.optim.SGD(ps, lr=0.0)
    run(model, judge, **options, **(scaled() if mixed else {}))
    losses = [net()(batch).square().mean().item() for batch in BATCHES]
    want = [sum(losses[i : i + window]) / window for i in range(0, len(losses), window)]
    assert judge.seen == pytest.approx(want, rel=0.02 if mixed else 1e-5)


def test_48_a_spike_of_the_loss_is_skipped() -> None:
    class Spiky(Automatic):
        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) + 1000 * float(batch is self.spike)

    flat = [BATCHES[0] + 1e-3 * i for i in range(8)]
    model = Spiky()
    model.spike = flat[6]
    _, reports = run(model, distclip.SkipSpikes(min_history=4, window=8, use_loss=True), batches=flat)
    assert [bool(r.skipped) for r in reports.seen] == [i == 6 for i in range(8)]


# --- what an optimizer does not hold ---------------------------------------------------------------------


def test_48_the_parameters_that_an_optimizer_holds() -> None:
    """Gradients of a part that nothing trains are never zeroed, and Lightning does not clip them either."""

    class Head(Automatic):
        def configure_optimizers(self) -> Any:
            return sgd(self.net[2].parameters())

    theirs, ours = Head(), Head()
    fit(theirs, gradient_clip_val=BOUND)
    _, reports = run(ours)
    assert_equal(ours.net.parameters(), theirs.net.parameters())
    assert max(reports.norms) < 10


def test_48_a_head_that_the_optimizer_does_not_hold_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Replaces(Automatic):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 2:
                self.net[2] = nn.Linear(5, 3)

    with caplog.at_level(logging.WARNING, "distclip"):
        run(Replaces())
    (said,) = [r.getMessage() for r in caplog.records if r.name == "distclip"]
    assert (
        "SGD still holds 2 parameters (the first of shape (3, 5)) that are not in Replaces any more" in said
    )


# --- on two ranks ----------------------------------------------------------------------------------------


class Uneven(Manual):
    """A batch that is bad on the last rank."""

    bad = 2

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == self.bad and self.global_rank == 1:
            batch = BAD
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [sgd, fused])
@on_ranks(2)
@guest()
def test_48_all_ranks_skip(rank: int, make: Any) -> list[list[float]]:
    good = [b for i, b in enumerate(BATCHES) if i != 2]
    weights, norms = by_hand(make, good)
    model = Uneven()
    model.make = make
    clip = ClipGradients(distclip.GlobalNorm(BOUND))
    reports = Reports(clip)
    fit(model, clip, reports, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    assert [bool(r.skipped) for r in reports.seen] == [False, False, True, False]
    assert [n for n in reports.norms if math.isfinite(n)] == pytest.approx(norms, rel=1e-5)
    assert_equal(model.net.parameters(), weights)
    return [p.flatten().tolist() for p in model.net.parameters()]


@on_ranks(2)
@guest()
def test_48_all_ranks_are_told(rank: int) -> None:
    with contextlib.suppress(SystemExit), pytest.raises(ValueError, match="past Lightning"):
        fit(
            Manual(), ClipGradients(distclip.GlobalNorm(BOUND)),
            strategy=DDPStrategy(process_group_backend="gloo"), devices=2, **scaled(),
        )  # fmt: skip
