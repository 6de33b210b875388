"""22 to 26 by way of Accelerate, Hugging Face's Trainer and Lightning: what a program does to its parameters
or its optimizer between steps ends in the norm of float64, or in an error on every rank."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import distclip
from distclip.integrations import accelerate, transformers
from distclip.integrations.lightning import ClipGradients
from tests import oracle
from tests.faults.test_48_lightning import fit
from tests.harness import on_ranks
from tests.integrations.accelerators import WIDTH, accelerator, environment, net
from tests.integrations.test_lightning import Reports, guest, pytestmark
from tests.integrations.test_transformers import logged, trainer

__all__ = ["pytestmark"]

BOUND = 1e-2  # far below any gradient of these tests
STEPS = 6
AT = 2  # the step before which something changes


def norm_of(parameters: Any) -> float:
    return oracle.norm(oracle.dense_gradients(parameters))


# --- what is done to the model, and to the optimizer -------------------------------------------------------


class Low(nn.Module):
    """A linear layer, frozen, and adapters beside it."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def head(model: Any, optimizer: Any) -> None:
    model.head = nn.Linear(WIDTH, 3)
    optimizer.add_param_group({"params": list(model.head.parameters())})


def head_of_which_the_optimizer_is_not_told(model: Any, optimizer: Any) -> None:
    model.head = nn.Linear(WIDTH, 3)


def head_in_the_old_ones_place(model: Any, optimizer: Any) -> None:
    old = {id(p): k for k, p in enumerate(model.head.parameters())}
    model.head = nn.Linear(WIDTH, 3)
    new = list(model.head.parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[old[id(p)]] if id(p) in old else p for p in group["params"]]


def added(model: Any, optimizer: Any) -> None:
    model.head = nn.Sequential(model.head, nn.Linear(3, 3))
    optimizer.add_param_group({"params": list(model.head[1].parameters())})


def lora(model: Any, optimizer: Any) -> None:
    model.requires_grad_(False)
    model.head = Low(model.head, WIDTH)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]


def frozen(model: Any, optimizer: Any) -> None:
    model.first.requires_grad_(False)
    for p in model.first.parameters():
        p.grad = None


def unfrozen(model: Any, optimizer: Any) -> None:
    """It was frozen from the start, and the optimizer held it."""
    model.second.requires_grad_(True)


def assigned(model: Any, optimizer: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def assigned_of_which_the_optimizer_is_not_told(model: Any, optimizer: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def groups_split(model: Any, optimizer: Any) -> None:
    whole = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = whole[:3]
    optimizer.add_param_group({"params": whole[3:]})


def a_list_less(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][2:]


CHANGES: list[Callable[[Any, Any], None]] = [
    head, head_of_which_the_optimizer_is_not_told, head_in_the_old_ones_place, added, lora, frozen, unfrozen,
    assigned, assigned_of_which_the_optimizer_is_not_told, groups_split, a_list_less,
]  # fmt: skip
UNTOLD = (head_of_which_the_optimizer_is_not_told, assigned_of_which_the_optimizer_is_not_told)


def start(change: Any) -> nn.Module:
    model = net()
    model.second.requires_grad_(change is not unfrozen)
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.05)


def loss_of(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return model(torch.randn(4, WIDTH, generator=generator)).square().sum()


STRATEGIES: dict[str, Any] = {
    "as called": None,
    "global": lambda: distclip.GlobalNorm(BOUND),
    "with state": lambda: distclip.Chain(distclip.SkipSpikes(), distclip.GlobalNorm(BOUND)),
    "by name": lambda: distclip.Chain(distclip.AdaGC(warmup=100), distclip.GlobalNorm(BOUND)),
}


# --- Accelerate ------------------------------------------------------------------------------------------

LISTS: dict[str, Callable[[Any], Any]] = {
    "all": lambda model: model.parameters(),
    "those that train": lambda model: [p for p in model.parameters() if p.requires_grad],
    "with a gradient": lambda model: [p for p in model.parameters() if p.grad is not None],
}


@pytest.mark.parametrize(
    ("strategy", "which"), [("as called", "all"), *[("with state", which) for which in LISTS]]
)
@pytest.mark.parametrize("change", CHANGES)
def test_22_accelerate(change: Any, strategy: str, which: str) -> None:
    make = STRATEGIES[strategy]
    with accelerator("single") as a:
        model = start(change)
        model, optimizer = a.prepare(model, sgd(model.parameters()))
        handle = accelerate.install(a, None if make is None else make())
        for step in range(STEPS):
            if step == AT:
                change(model, optimizer.optimizer)
            a.backward(loss_of(model, step))
            clipped = list(LISTS[which](model))
            want = norm_of(clipped)
            assert want > 4 * BOUND
            if step == AT and make is not None and change is assigned_of_which_the_optimizer_is_not_told:
                with pytest.raises(ValueError, match="no optimizer that this accelerator has prepared holds"):
                    a.clip_grad_norm_(LISTS[which](model), BOUND)
                return
            assert a.clip_grad_norm_(LISTS[which](model), BOUND).item() == pytest.approx(want, rel=1e-5)
            assert norm_of(clipped) == pytest.approx(BOUND, rel=1e-4)
            held = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            before = [p.detach().clone() for p in held]
            optimizer.step()
            assert all(not torch.equal(p, b) for p, b in zip(held, before, strict=True))
            assert not optimizer.step_was_skipped
            for p in {id(p): p for p in [*model.parameters(), *held]}.values():
                p.grad = None
        assert handle.report is not None
        if make is not None:
            (state,) = handle.state_dict()["lists"]  # what was learned goes on
            assert state["strategy"] or strategy == "global"


@pytest.mark.parametrize("strategy", ["as called", "with state"])
@pytest.mark.parametrize("change", [head, lora, unfrozen, assigned, groups_split])
@on_ranks(2)
def test_22_accelerate_prepared_anew(rank: int, change: Any, strategy: str) -> list[float]:
    """As DDP wants it: what it has wrapped is taken out, changed and wrapped again."""
    make, norms = STRATEGIES[strategy], []
    with accelerator("ddp") as a:
        model = start(change)
        ddp, optimizer = a.prepare(model, sgd(model.parameters()))
        accelerate.install(a, None if make is None else make())
        for step in range(STEPS):
            if step == AT:
                a._models.clear()
                del ddp
                torch.manual_seed(5)
                change(model, optimizer.optimizer)
                ddp = a.prepare_model(model)
            a.backward(loss_of(ddp, step, rank))
            want = norm_of(model.parameters())
            norms.append(a.clip_grad_norm_(ddp.parameters(), BOUND).item())
            assert norms[-1] == pytest.approx(want, rel=1e-5)
            assert norm_of(model.parameters()) == pytest.approx(BOUND, rel=1e-4)
            optimizer.step()
            model.zero_grad()
    return norms


@pytest.mark.parametrize("strategy", ["as called", "global"])
@on_ranks(2)
def test_22_what_ddp_does_not_synchronise_is_an_error(rank: int, strategy: str) -> str:
    """Unfrozen after DDP has wrapped it, which does not reduce it then: each rank keeps a gradient of its
    own."""
    make = STRATEGIES[strategy]
    with accelerator("ddp") as a:
        model = start(unfrozen)
        ddp, optimizer = a.prepare(model, sgd(model.parameters()))
        accelerate.install(a, None if make is None else make())
        for step in range(STEPS):
            if step == AT:
                unfrozen(model, optimizer)
            a.backward(loss_of(ddp, step, rank))
            try:
                a.clip_grad_norm_(ddp.parameters(), BOUND)
            except distclip.OwnershipError as error:
                return f"{str(error).split('(')[0]} at step {step}"
            optimizer.step()
            model.zero_grad()
    raise AssertionError("nobody noticed")


# --- Trainer ---------------------------------------------------------------------------------------------


class Measured(Trainer):
    """Notes the norm of float64 between backward and the clip."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.norms.append(norm_of(self.model.parameters()))
        return loss


class Changes(TrainerCallback):
    def __init__(self, trainer: Trainer, change: Callable[[Any, Any], None]) -> None:
        self.trainer, self.change = trainer, change
        self.after: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT:
            self.change(self.trainer.model, self.trainer.optimizer.optimizer)  # type: ignore[union-attr]
        for p in self.trainer.model.parameters():
            p.grad = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(norm_of(self.trainer.model.parameters()))


def resized(model: Any, optimizer: Any) -> None:
    """The parameter stays, with other data: what Adam keeps for it would have the old shape."""
    before = model.transformer.wte.weight
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model.transformer.wte.weight is before
    assert model.lm_head.weight is before
    del optimizer.state[before]


def a_block_replaced(model: Any, optimizer: Any) -> None:
    model.transformer.h[0].mlp = copy.deepcopy(model.transformer.h[0].mlp)
    optimizer.param_groups[0]["params"] += list(model.transformer.h[0].mlp.parameters())


def a_head_of_its_own(model: Any, optimizer: Any) -> None:
    """Untied."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    optimizer.param_groups[0]["params"] += [model.lm_head.weight]


def adapters(model: Any, optimizer: Any) -> None:
    model.requires_grad_(False)
    block = model.transformer.h[0]
    block.adapter = nn.Linear(16, 16)
    block.mlp.register_forward_hook(lambda module, args, out: out + block.adapter(args[0]))
    optimizer.param_groups[0]["params"] += list(block.adapter.parameters())


def thawed(model: Any, optimizer: Any) -> None:
    """The optimizer does not hold them: the Trainer has left out what was frozen."""
    model.transformer.wpe.requires_grad_(True)
    optimizer.param_groups[0]["params"] += list(model.transformer.wpe.parameters())


def reassigned(model: Any, optimizer: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.tie_weights()
    decayed, others = optimizer.param_groups
    decayed["params"], others["params"] = list(model.parameters()), []


OF_TRAINER = [
    resized, a_block_replaced, a_head_of_its_own, adapters, thawed, reassigned,
]  # fmt: skip


@pytest.mark.parametrize("strategy", ["as called", "with state"])
@pytest.mark.parametrize("change", OF_TRAINER)
def test_22_trainer(change: Any, strategy: str, tmp_path: Path) -> None:
    make = STRATEGIES[strategy]
    with environment(False):
        t = trainer(tmp_path, kind=Measured, max_steps=5, max_grad_norm=BOUND, lr_scheduler_type="constant")
        if change is thawed:
            t.model.transformer.wpe.requires_grad_(False)
        changes = Changes(t, change)
        t.add_callback(changes)
        with install_in(t, make):
            t.train()
        assert logged(t, "grad_norm") == pytest.approx(t.norms, rel=1e-5)
        assert min(t.norms) > 4 * BOUND
        assert changes.after == pytest.approx([BOUND] * 5, rel=1e-4)


def install_in(t: Trainer, make: Any) -> Any:
    return transformers.install(t, None if make is None else make())


# --- Lightning -------------------------------------------------------------------------------------------


class Lit(pl.LightningModule):
    def __init__(self, change: Callable[[Any, Any], None] | None, *, raw: bool = False) -> None:
        super().__init__()
        self.model = start(change)
        self.change, self.raw = change, raw
        self.automatic_optimization = not raw

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.model.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT and self.change is not None:
            torch.manual_seed(5)
            self.change(self.model, self.trainer.optimizers[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.model, batch_idx, self.global_rank)
        if not self.raw:
            return loss
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.on_before_optimizer_step(optimizer)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms = [*getattr(self, "norms", []), norm_of(held)]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad = None


@pytest.mark.parametrize(("strategy", "raw"), [("with state", False), ("by name", True)])
@pytest.mark.parametrize("change", CHANGES)
def test_22_lightning(change: Any, strategy: str, raw: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The norm is that of what the optimizer holds, as Lightning's own clipping has it."""
    module = Lit(change, raw=raw)
    clip = ClipGradients(STRATEGIES[strategy]())
    reports = Reports(clip)
    with caplog.at_level(logging.WARNING, "distclip"):
        fit(module, clip, reports, batches=range(STEPS))
    assert reports.norms == pytest.approx(module.norms, rel=1e-5)
    assert min(module.norms[:AT]) > 4 * BOUND
    for report, norm in zip(reports.seen, module.norms, strict=True):
        assert report.clipped_norm.item() == pytest.approx(min(norm, BOUND), rel=1e-4)
    said = [r.getMessage() for r in caplog.records if "are not in" in r.getMessage()]
    assert len(said) == (change in (*UNTOLD, head))  # whose old one it still holds


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.model.first, pl_module.model.second])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch in (1, 2):
            module = pl_module.model.second if epoch == 1 else pl_module.model.first
            self.unfreeze_and_add_param_group(module, optimizer)


class OfTrained(Lit):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(p for p in self.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("strategy", ["global", "with state", "by name"])
def test_22_lightning_thaws(strategy: str) -> None:
    module, clip = OfTrained(None), ClipGradients(STRATEGIES[strategy]())
    reports = Reports(clip)
    fit(module, Thaws(), clip, reports, batches=range(2), max_epochs=3)
    assert reports.norms == pytest.approx(module.norms, rel=1e-5)
    assert len(clip.clippers[0].tensors) == len(list(module.parameters()))
    assert "model.first.up.weight" in clip.clippers[0].plan.names


@on_ranks(2)
@guest()
def test_22_lightning_thaws_under_ddp(rank: int) -> None:
    """Which DDP does not reduce, since they were frozen when it wrapped the module."""
    module, clip = OfTrained(None), ClipGradients(STRATEGIES["global"]())
    with pytest.raises(distclip.OwnershipError, match=r"model\.second"):
        fit(
            module, Thaws(), clip, batches=range(2), max_epochs=3,
            strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
        )  # fmt: skip
    assert dist.is_initialized()
