"""Lightning's Trainer and Fabric: equal numbers where Lightning's own clipping is right, and distclip where
it refuses.

Lightning's strategies for FSDP ask for a GPU. On the CPU what runs here is its real code all the same: the
``ModelParallelStrategy`` unmodified, and the ``FSDPStrategy`` by a subclass, which the check for a GPU lets
pass. The scaler of ``16-mixed`` is one for the CPU, handed to the real ``MixedPrecision`` plugin.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricMixedPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

import distclip
from distclip.integrations.lightning import ClipGradients, step
from tests.harness import on_ranks
from tests.starting import python

pytestmark = [
    # Lightning's advice on workers and logging intervals, and its own use of what torch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
]
BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) * (1 + i % 3) for i in range(6)]
MAX_NORM = 0.5  # between the smallest and the largest norm of these batches


class Model(pl.LightningModule):
    def __init__(self, *, fused: bool = False, manual: float | None = None, sharded: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.fused, self.manual, self.sharded = fused, manual, sharded
        self.automatic_optimization = manual is None

    def configure_model(self) -> None:
        if self.sharded == "fsdp2":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        if self.sharded == "fsdp1":  # which looks for a GPU, unless it is told to keep to the CPU
            own = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)
            self.net = own  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=self.fused, foreach=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.net(batch).square().mean()
        if self.manual is None:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.manual:
            self.clip_gradients(optimizer, gradient_clip_val=self.manual)
        optimizer.step()
        return None


class Norms(pl.Callback):
    """The float64 norm of the gradients just before each step, where they have been unscaled."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        total = sum(float(whole(p.grad).double().square().sum()) for p in pl_module.parameters())
        self.seen.append(math.sqrt(total))


class Reports(pl.Callback):
    """What ClipGradients reports and what the Trainer logs, of each step. To stand after it."""

    def __init__(self, clip: ClipGradients) -> None:
        self.clip = clip
        self.seen: list[distclip.ClipReport] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        report = self.clip.report
        if report is not None and (not self.seen or report is not self.seen[-1]):
            self.seen.append(report)
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    @property
    def norms(self) -> list[float]:
        return [report.total_norm.item() for report in self.seen]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# What newer ones have to be told, since they read no pickles without.
PICKLES: dict[str, Any] = (
    {"weights_only": False} if "weights_only" in signature(pl.Trainer.fit).parameters else {}
)


def fit(model: Model, *callbacks: pl.Callback, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False} | options
    trainer = pl.Trainer(
        callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path, **PICKLES)
    return trainer


def weights(model: nn.Module) -> list[list[float]]:
    return [whole(p.detach()).flatten().tolist() for p in model.parameters()]


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(x == pytest.approx(y, rel=1e-5, abs=1e-7) for x, y in zip(weights(a), weights(b), strict=True))


def scaled(scale: float = 2.0**10) -> dict[str, Any]:
    """``precision="16-mixed"``, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


OPTIONS = {"plain": {}, "accumulated": {"accumulate_grad_batches": 2}, "bf16": {"precision": "bf16-mixed"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_norm_as_lightning_clips_it(options: dict[str, Any]) -> None:
    theirs, ours, unclipped = Model(), Model(), Model()
    fit(theirs, gradient_clip_val=MAX_NORM, **options)
    fit(unclipped, **options)
    norms, clip = Norms(), ClipGradients(distclip.GlobalNorm(MAX_NORM))
    reports = Reports(clip)
    fit(ours, norms, clip, reports, **options)
    assert close(ours, theirs)
    assert not close(ours, unclipped)
    assert len(norms.seen) == clip.clippers[0].steps == 6 // options.get("accumulate_grad_batches", 1)
    assert min(norms.seen) < MAX_NORM < max(norms.seen)
    assert reports.norms == pytest.approx(norms.seen, rel=1e-6)
    for logged, report in zip(reports.logged, reports.seen, strict=True):
        assert logged["clip/norm"] == report.total_norm.item()
        assert logged["clip/threshold"] == MAX_NORM
        assert logged["clip/coefficient"] == report.coefficient.item()
        assert logged["clip/clipped"] == (report.total_norm.item() > MAX_NORM)


def test_values_as_lightning_clips_them() -> None:
    theirs, ours, unclipped = Model(), Model(), Model()
    fit(theirs, gradient_clip_val=0.02, gradient_clip_algorithm="value")
    fit(ours, ClipGradients(distclip.Value(0.02)))
    fit(unclipped)
    assert weights(ours) == weights(theirs)
    assert not close(ours, unclipped)


@pytest.mark.parametrize("mixed", [False, True])
def test_manual_optimization(mixed: bool) -> None:
    """Beside Lightning's ``self.clip_gradients`` by hand; with a scaler, which it would clip before unscaling
    by hand, beside its automatic optimization."""
    theirs, ours = Model(manual=None if mixed else MAX_NORM), Model(manual=0.0)
    fit(theirs, **(scaled() | {"gradient_clip_val": MAX_NORM} if mixed else {}))
    clip = ClipGradients(distclip.GlobalNorm(MAX_NORM))
    fit(ours, clip, **(scaled() if mixed else {}))
    assert close(ours, theirs)
    assert clip.clippers[0].steps == 6


def test_fused_optimizer_and_scaler() -> None:
    """Lightning refuses. The reference is what it does with the optimizer that is not fused."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Model(fused=True), gradient_clip_val=MAX_NORM, **scaled())
    theirs = Model()
    fit(theirs, gradient_clip_val=MAX_NORM, **scaled())
    for apply in ("inplace", "deferred"):
        ours, norms = Model(fused=True), Norms()
        clip = ClipGradients(distclip.GlobalNorm(MAX_NORM), apply=apply)  # type: ignore[arg-type]
        reports = Reports(clip)
        options = scaled()
        fit(ours, norms, clip, reports, **options)
        assert close(ours, theirs), apply
        assert reports.norms == pytest.approx(norms.seen, rel=1e-6)
        assert min(norms.seen) < MAX_NORM < max(norms.seen)
        assert options["plugins"][0].scaler.get_scale() == 2.0**12  # doubled after three steps, twice


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_that_is_not_finite_is_left_out(
    fused: bool, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a scaler Lightning takes it, and all weights are NaN."""
    bad = torch.full((4, 6), math.nan)

    def make() -> tuple[Model, dict[str, Any]]:
        return Model(fused=fused), scaled() if mixed else {}

    monkeypatch.setattr(f"{__name__}.BATCHES", BATCHES[:3])
    without, options = make()
    fit(without, ClipGradients(distclip.ZClip(warmup=2)), **options)
    monkeypatch.setattr(f"{__name__}.BATCHES", [*BATCHES[:3], bad])
    theirs, options = make()
    fit(theirs, **options)
    assert math.isnan(weights(theirs)[0][0]) == (not mixed)
    ours, options = make()
    clip = ClipGradients(distclip.ZClip(warmup=2))
    fit(ours, clip, **options)
    assert clip.report is not None
    assert clip.report.skipped
    assert weights(ours) == weights(without)
    if mixed:
        assert options["plugins"][0].scaler.get_scale() == 2.0**10  # doubled once, and halved


class Two(Model):
    """Two optimizers, each for one layer."""

    def configure_optimizers(self) -> Any:
        layers = self.net[0], self.net[2]
        return [torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False) for layer in layers]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        for optimizer in optimizers:
            if self.manual:
                self.clip_gradients(optimizer, gradient_clip_val=self.manual)
            optimizer.step()


def test_each_optimizer_is_clipped_on_its_own() -> None:
    theirs, ours = Two(manual=0.3), Two(manual=0.0)
    fit(theirs)
    clip = ClipGradients(distclip.GlobalNorm(0.3))
    fit(ours, clip)
    assert close(ours, theirs)
    assert [clipper.steps for clipper in clip.clippers.values()] == [6, 6]
    assert clip.clippers[0].strategy is not clip.clippers[1].strategy


@pytest.mark.parametrize("two", [False, True])
def test_state_is_saved_and_restored(two: bool, tmp_path: Path) -> None:
    def make() -> tuple[Model, ClipGradients]:
        model = Two(manual=0.0) if two else Model()
        return model, ClipGradients(distclip.ZClip(warmup=4, z_threshold=0.5))

    model, clip = make()
    reports = Reports(clip)
    fit(model, clip, reports, max_epochs=2)
    first, clip = make()
    fit(first, clip).save_checkpoint(tmp_path / "saved.ckpt")
    resumed, clip = make()
    again = Reports(clip)
    fit(resumed, clip, again, ckpt_path=tmp_path / "saved.ckpt", max_epochs=2)
    assert again.norms == reports.norms[6:]
    thresholds = [[r.threshold.item() for r in seen] for seen in (again.seen, reports.seen[6:])]
    assert thresholds[0] == thresholds[1]
    assert weights(resumed) == weights(model)
    assert [clipper.steps for clipper in clip.clippers.values()] == [12] * (1 + two)
    fresh, clip = make()  # the same weights, without the state: it would go on otherwise
    fresh.load_state_dict(first.state_dict())
    lost = Reports(clip)
    fit(fresh, clip, lost)
    assert [r.threshold.item() for r in lost.seen] != thresholds[0]


def test_who_would_clip_twice_is_told() -> None:
    class Own(Model):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None: ...

    class Lbfgs(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    class OwnStep(MixedPrecision):
        def optimizer_step(self, *_: Any, **__: Any) -> None: ...

    def clip() -> ClipGradients:
        return ClipGradients(distclip.GlobalNorm(1.0))

    with pytest.raises(ValueError, match="would both clip"):
        fit(Model(), clip(), gradient_clip_val=0.5)
    with pytest.raises(ValueError, match=r"Own\.configure_gradient_clipping would not be called"):
        fit(Own(), clip())
    with pytest.raises(ValueError, match="LBFGS runs backward several times"):
        fit(Lbfgs(), clip())
    with pytest.raises(TypeError, match="OwnStep takes optimizer steps in a way of its own"):
        fit(Model(), clip(), plugins=[OwnStep("bf16-mixed", "cpu")])
    with pytest.raises(TypeError, match=r"expected a distclip\.Strategy"):
        ClipGradients(1.0)  # type: ignore[arg-type]


def test_lightnings_step_is_given_back() -> None:
    trainer = fit(Model(), ClipGradients(distclip.GlobalNorm(1.0)))
    assert "optimizer_step" not in vars(trainer.precision_plugin)


# --- Fabric ----------------------------------------------------------------------------------------------


def with_fabric(*, ours: bool, fused: bool, mixed: bool) -> tuple[nn.Module, list[float]]:
    """The weights that Fabric's own clipping, or ``step``, comes to, and the norms on the way."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [FabricMixedPrecision("16-mixed", "cpu", scaler)] if mixed else []
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.05, fused=fused, foreach=False)
    model, optimizer = fabric.setup(net, optimizer)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(MAX_NORM))
    norms = []
    for batch in BATCHES:
        optimizer.zero_grad()
        fabric.backward(model(batch).square().mean())
        if ours:
            norms.append(step(fabric, clipper, optimizer).total_norm.item())
        else:
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)))
            optimizer.step()
    return net, norms


@pytest.mark.parametrize("mixed", [False, True])
def test_fabric(mixed: bool) -> None:
    theirs, their_norms = with_fabric(ours=False, fused=False, mixed=mixed)
    assert min(their_norms) < MAX_NORM < max(their_norms)
    if mixed:
        with pytest.raises(
            NotImplementedError, match="not implemented for optimizers handling the unscaling"
        ):
            with_fabric(ours=False, fused=True, mixed=True)
    for fused in (False, True):
        ours, our_norms = with_fabric(ours=True, fused=fused, mixed=mixed)
        assert our_norms == pytest.approx(their_norms, rel=1e-6)
        assert close(ours, theirs)


# --- spread over ranks -----------------------------------------------------------------------------------


class OnCpu(FSDPStrategy):
    """The FSDPStrategy itself: its check for a GPU goes by the exact type."""


@contextlib.contextmanager
def guest() -> Iterator[None]:
    """Lightning in a rank of the pool, which is left as it was. (The pool turns warnings into errors: these
    are Lightning's advice, and torch's to Lightning. Lightning takes WORLD_SIZE away when it ends.)"""
    environment = dict(os.environ)
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        yield
        dist.barrier()
    os.environ.clear()
    os.environ.update(environment)


def on_two(kind: str) -> dict[str, Any]:
    strategy: Any = OnCpu(process_group_backend="gloo")
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    return {"strategy": strategy, "devices": 2}


@on_ranks(2)
@guest()
def fit_on_two(rank: int, kind: str, fused: bool, want: list[list[float]], want_norms: list[float]) -> None:
    options = scaled() if fused else {}
    refused = {"gradient_clip_val": MAX_NORM} | options
    if kind == "fsdp1":
        with pytest.raises(MisconfigurationException, match="is currently not supported for `FSDPPrecision`"):
            fit(Model(sharded=kind), **on_two(kind), **refused)
    elif fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(Model(fused=True, sharded=kind), **on_two(kind), **refused)
    else:  # Lightning is right
        theirs = Model(sharded=kind)
        fit(theirs, **on_two(kind), **refused)
        assert weights(theirs) == [pytest.approx(w, rel=1e-5, abs=1e-7) for w in want]
    ours = Model(fused=fused, sharded=kind)
    clip = ClipGradients(distclip.GlobalNorm(MAX_NORM))
    reports, got = Reports(clip), Weights()
    fit(ours, clip, reports, got, **on_two(kind), **(scaled() if fused else {}))
    assert reports.norms == pytest.approx(want_norms, rel=1e-3 if fused else 1e-5)
    assert got.seen == [pytest.approx(w, rel=1e-5, abs=1e-7) for w in want]


@on_ranks(2)
@guest()
def resume_on_two(rank: int, saved: Path) -> list[float]:

    def make() -> tuple[Model, ClipGradients, Reports]:
        clip = ClipGradients(distclip.ZClip(warmup=4, z_threshold=0.5))
        return Model(sharded="fsdp2"), clip, Reports(clip)

    model, clip, whole_run = make()
    fit(model, clip, whole_run, max_epochs=2, **on_two("fsdp2"))
    model, clip, _ = make()
    fit(model, clip, **on_two("fsdp2")).save_checkpoint(saved)  # a directory, written by all ranks
    model, clip, resumed = make()
    fit(model, clip, resumed, ckpt_path=saved, max_epochs=2, **on_two("fsdp2"))
    assert clip.clippers[0].steps == 12
    for got, want in zip(resumed.seen, whole_run.seen[6:], strict=True):
        assert (got.total_norm, got.threshold) == (want.total_norm, want.threshold)
    return resumed.norms


def test_state_is_restored_with_a_distributed_checkpoint(tmp_path: Path) -> None:
    resume_on_two(tmp_path / "saved")


class Weights(pl.Callback):
    """The whole weights at the end, from every rank's part of them."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            with FullyShardedDataParallel.summon_full_params(pl_module.net, writeback=False):
                self.seen = weights(pl_module)
        else:
            self.seen = weights(pl_module)


@pytest.mark.parametrize(("kind", "fused"), [("fsdp2", False), ("fsdp2", True), ("fsdp1", False)])
def test_sharded(kind: str, fused: bool) -> None:
    """All ranks get the same batches, so one process is the reference: there Lightning is right."""
    one, norms = Model(), Norms()
    fit(one, norms, gradient_clip_val=MAX_NORM, **(scaled() if fused else {}))
    assert min(norms.seen) < MAX_NORM < max(norms.seen)
    fit_on_two(kind, fused, weights(one), norms.seen)


OTHER_NAME = """
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
import distclip
from distclip.integrations.lightning import ClipGradients

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)
    def training_step(self, batch, i):
        return (self.w * torch.tensor([3.0, 4.0])).sum()

model, clip = Model(), ClipGradients(distclip.GlobalNorm(1.0))
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(accelerator="cpu", max_steps=1, callbacks=[clip], **quiet)
trainer.fit(model, torch.utils.data.DataLoader([0, 1]))
assert isinstance(clip, pl.Callback)
print(clip.report.total_norm.item(), [round(x, 4) for x in model.w.tolist()])
"""


def test_under_its_other_name() -> None:
    """``pytorch_lightning`` is the same code with classes of its own."""
    done = python("-c", OTHER_NAME)
    assert done.stdout.strip().splitlines()[-1] == "5.0 [-0.6, -0.8]"
