"""The Trainer's own run and the same with distclip, side by side; its logs and checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import distclip
from distclip.integrations.transformers import install
from tests import oracle
from tests.harness import on_ranks
from tests.integrations.accelerators import before_1_15, environment, pretend_gpus
from tests.starting import TORCH

MAX_NORM = 0.5


class Tokens(Dataset):  # type: ignore[type-arg]
    """The bytes of this file, in pieces of 16."""

    def __init__(self) -> None:
        text = Path(__file__).read_bytes()[: 16 * 64]
        self.pieces = torch.tensor(list(text)).view(-1, 16) % 128

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i]}


def trainer(where: Path, kind: type[Trainer] = Trainer, **kwargs: Any) -> Trainer:
    torch.manual_seed(3)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 128, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0))
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": MAX_NORM,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | kwargs
    training_arguments = TrainingArguments(str(where), **arguments)
    if "fsdp" in kwargs:
        assert training_arguments.device.type == "cpu"  # which settles that
        pretend_gpus()
    return kind(model, training_arguments, train_dataset=Tokens())


def logged(t: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in t.state.log_history if key in entry]


def side_by_side(where: Path, **kwargs: Any) -> list[float]:
    runs = []
    for with_distclip in (False, True):
        with environment(dist.is_initialized()):
            t = trainer(where, **kwargs)
            if with_distclip:
                install(t)
            t.train()
            if "fsdp" in kwargs:
                assert t.accelerator.distributed_type == "FSDP"
                assert t.accelerator.is_fsdp2 == (kwargs["fsdp_config"]["version"] == 2)
            weights = [oracle.dense(p) for p in t.model_wrapped.parameters()]
            runs.append((logged(t, "loss"), logged(t, "grad_norm"), weights))
            if with_distclip:
                norms = logged(t, "grad_norm")
                assert all(type(norm) is float for norm in norms)
                assert logged(t, "clip_threshold") == [MAX_NORM] * len(norms)
                assert logged(t, "clip_rate") == [float(norm > MAX_NORM) for norm in norms]
                assert logged(t, "skip_rate") == [0.0] * len(norms)
                assert sum(norm > MAX_NORM for norm in norms) > 2
    assert len(runs[0][0]) == 6
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    own = TORCH < (2, 9) and kwargs.get("fsdp_config", {}).get("version") == 2
    if own:  # with torch 2.8 the Trainer logs the norm of what the rank holds itself
        assert all(mine > theirs for mine, theirs in zip(runs[1][1], runs[0][1], strict=True))
    else:
        assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)
    assert runs[1][0][-1] < 0.97 * runs[1][0][0]
    for mine, theirs in zip(runs[1][2], runs[0][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    return runs[1][1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_side_by_side(tmp_path: Path, accumulate: int) -> None:
    side_by_side(tmp_path, gradient_accumulation_steps=accumulate)


@on_ranks(2)
def test_side_by_side_on_two_ranks(rank: int, tmp_path: Path) -> list[float]:
    return side_by_side(tmp_path, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "version", [1, pytest.param(2, marks=before_1_15("cannot shard tied weights by FSDP2"))]
)
@on_ranks(2)
def test_side_by_side_under_fsdp(rank: int, tmp_path: Path, version: int) -> list[float]:
    """On the CPU as ``tests.integrations.accelerators`` says."""
    config: dict[str, Any] = {"version": version, "cpu_ram_efficient_loading": False}
    if version == 1:
        config |= {
            "reshard_after_forward": "FULL_SHARD",
            "use_orig_params": True,
            "sync_module_states": False,
        }
    return side_by_side(tmp_path, fsdp=True, fsdp_config=config)


def percentile() -> distclip.Percentile:
    return distclip.Percentile(percentile=50, multiplier=0.9, warmup=2, initial=0.1)


def resumed(where: Path, restore: bool = False) -> list[float]:
    """A run, and the same in two parts."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }
    with environment(dist.is_initialized()):
        t = trainer(where, **options)
        install(t, percentile())
        t.train()
        whole = logged(t, "clip_threshold"), logged(t, "grad_norm"), logged(t, "loss")
        assert len(set(whole[0])) > 3  # it moves
        assert sum(logged(t, "clip_rate")) >= 2
    with environment(dist.is_initialized()):
        t = trainer(where, **options)
        handle = install(t, percentile())
        t.train(resume_from_checkpoint=str(where / "checkpoint-3"))
        again = logged(t, "clip_threshold"), logged(t, "grad_norm"), logged(t, "loss")
        assert [len(numbers) for numbers in again] == [6, 6, 6]  # of which the Trainer has read three
        for mine, theirs in zip(again, whole, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert handle.report is not None
        handle.remove()
    return whole[0]


@pytest.mark.parametrize("restore", [False, True])
def test_state_through_a_checkpoint(tmp_path: Path, restore: bool) -> None:
    resumed(tmp_path, restore)


@on_ranks(2)
def test_state_through_a_checkpoint_of_two_ranks(rank: int, tmp_path: Path) -> list[float]:
    return resumed(tmp_path)


def test_a_checkpoint_saved_without_distclip(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    with environment(False):
        trainer(tmp_path, **options).train()
    with environment(False):
        t = trainer(tmp_path, **options)
        install(t, percentile())
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert len(logged(t, "clip_threshold")) == 3
        assert logged(t, "clip_threshold")[0] == pytest.approx(0.1)  # its history begins here


def test_the_rate_is_that_of_the_steps_since_the_last_log(tmp_path: Path) -> None:
    with environment(False):
        each, every_third = trainer(tmp_path), trainer(tmp_path, logging_steps=3)
        for t in (each, every_third):
            with install(t, percentile()):
                t.train()
    flags = logged(each, "clip_rate")
    assert set(flags) == {0.0, 1.0}
    assert logged(every_third, "clip_rate") == pytest.approx([sum(flags[:3]) / 3, sum(flags[3:]) / 3])


def test_no_clipping_still_logs_the_norm(tmp_path: Path) -> None:
    with environment(False):
        t = trainer(tmp_path, max_grad_norm=0.0, max_steps=2)
        with pytest.raises(ValueError, match=r"max_grad_norm=0.0: the Trainer clips only where"):
            install(t, percentile())
        with install(t):
            t.train()
        assert len(logged(t, "grad_norm")) == 2
        assert logged(t, "clip_rate") == logged(t, "skip_rate") == [0.0, 0.0]
        assert not logged(t, "clip_threshold")  # there is none


STRATEGIES = {
    "no threshold": (None, {"max_grad_norm": 0.0}),
    "one that is infinite": (None, {"max_grad_norm": math.inf}),
    "none before there is a history": (lambda: distclip.SkipSpikes(min_history=4), {}),
    "one for each parameter": (lambda: distclip.AdaGC(warmup=1), {}),
    "by value": (lambda: distclip.Value(1e-3), {}),
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_what_is_written_is_json(tmp_path: Path, kind: str) -> None:
    """Without ``Infinity`` and ``NaN``, which other programs do not read."""
    make, options = STRATEGIES[kind]
    with environment(False):
        t = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **options)
        install(t, make() if make else None)
        t.train()
    written = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    state = json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} in {written}"))
    assert [key for key in state["log_history"][0] if key.startswith("clip")]


class Failing(Trainer):
    """Whose third and fourth losses are NaN."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step in (2, 3) else 1)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_are_skipped_are_seen(tmp_path: Path, fused: bool) -> None:
    options = {"lr_scheduler_type": "linear", "optim": "adamw_torch_fused" if fused else "adamw_torch"}
    with environment(False):
        t = trainer(tmp_path, kind=Failing, **options)
        with install(t, distclip.GlobalNorm(MAX_NORM)):
            t.train()
        assert logged(t, "skip_rate") == [0, 0, 1, 1, 0, 0]
        rates = logged(t, "learning_rate")
        assert rates[2] == rates[3] == rates[4] > rates[5]  # each is that of before its step's decay
        assert all(bool(p.isfinite().all()) for p in t.model.parameters())
        t = trainer(tmp_path, kind=Failing, logging_steps=3, **options)
        with install(t, distclip.GlobalNorm(MAX_NORM)):
            t.train()
        assert logged(t, "skip_rate") == pytest.approx([1 / 3, 1 / 3])


def test_the_trainer_does_not_clip_mixed_meshes_by_itself(tmp_path: Path) -> None:
    """Where it has seen gradients on several meshes it takes another way than through its accelerator."""
    with environment(False):
        t = trainer(tmp_path, max_steps=2)
        t._mixed_mesh_grads = True  # as it notes that
        install(t, distclip.PerGroup({"*wte*": 0.01, "*": 0.02}))
        t.train()
        assert logged(t, "clip_rate") == [1.0, 1.0]
        assert not logged(t, "clip_threshold")  # there are two


def test_removal(tmp_path: Path) -> None:
    with environment(False):
        t = trainer(tmp_path, max_steps=1)
        callbacks = list(t.callback_handler.callbacks)
        with install(t, percentile()) as handle:
            with pytest.raises(ValueError, match="installed in this trainer already"):
                install(t)
            assert "clip_grad_norm_" in vars(t.accelerator)
        handle.remove()
        assert t.callback_handler.callbacks == callbacks
        assert "clip_grad_norm_" not in vars(t.accelerator)
        assert not {"log", "_has_mixed_mesh_grads", "_distclip"} & set(vars(t))
        t.train()
        assert not logged(t, "clip_rate")
        with pytest.raises(TypeError, match=r"expected a transformers.Trainer"):
            install(nn.Linear(1, 1))
