"""57: gradients that wait for ``finalize_backward()``, which torch has since 2.15, are refused on every rank.
They are right afterwards, with overlap, in windows of micro-batches, and under Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.integrations.accelerate import install
from tests import oracle
from tests.faults.test_22_replaced import mlp
from tests.faults.ways import BOUND, Way
from tests.harness import on_ranks
from tests.integrations.accelerators import accelerator
from tests.layouts import mesh1

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "finalize_backward"), reason="torch has manual finalization since 2.15"
)
REFUSED = (ValueError, distclip.OwnershipError)  # the first clip says it with all other ranks
LAYOUTS = ["DDP", "FSDP2", "FSDP2, its handle"]


class Manual:
    """A model whose backward passes are finalised by hand."""

    def __init__(self, layout: str) -> None:
        self.model: Any = mlp()
        self.waits_for_handle = layout.endswith("handle")
        if layout == "DDP":
            self.model = DistributedDataParallel(self.model)
            self.model.require_manual_backward_finalization = True
        else:
            fully_shard(self.model[0], mesh=mesh1(2))
            fully_shard(self.model, mesh=mesh1(2))
            self.model.set_manual_backward_finalization(True)
        self.handle: Any = None

    def loss(self, rank: int, step: int) -> torch.Tensor:
        x = torch.linspace(-1, 1, 12).reshape(3, 4) * (1 + rank + step)
        return self.model(x).square().mean()

    def finalize(self) -> None:
        if self.waits_for_handle:
            self.handle = self.model.finalize_backward(async_op=True)
        else:
            self.model.finalize_backward()

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
        self.handle = None


def whole(model: nn.Module) -> float:
    return oracle.norm(oracle.dense_gradients(model.parameters()))


@pytest.mark.parametrize("way", ["clip", "clip, overlap", "step", "step, overlap", "function", "list"])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_57_refused_until_they_are_final(rank: int, layout: str, way: str) -> None:
    manual = Manual(layout)
    clip = Way(way, manual.model)
    for step in range(4):
        manual.model.zero_grad()
        manual.loss(rank, step).backward()
        for moment in ("before", "without waiting"):
            if moment == "without waiting":
                manual.finalize()
                if not manual.waits_for_handle:
                    continue
            with pytest.raises(REFUSED, match=r"not final: .*finalize_backward\(\)"):
                clip()
        manual.wait()
        want = whole(manual.model)
        assert clip().item() == pytest.approx(want, rel=1e-5), (step, want)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_57_in_a_window(rank: int, layout: str, overlap: bool) -> None:
    manual = Manual(layout)
    clipper = distclip.Clipper(manual.model, distclip.GlobalNorm(1e9), overlap=overlap)
    for step in range(3):
        manual.model.zero_grad()
        for part in range(2):
            with clipper.accumulate(2) as micro:
                micro.backward(manual.loss(rank, step + part))
        if step == 0:
            with pytest.raises(REFUSED, match="not final"):
                clipper.clip()
        manual.finalize()
        manual.wait()
        assert clipper.clip().total_norm.item() == pytest.approx(whole(manual.model), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_57_accelerate(rank: int, layout: str) -> None:
    manual = Manual(layout)
    with accelerator("ddp" if layout == "DDP" else "fsdp2") as a, install(a):
        a._models.append(manual.model)
        manual.loss(rank, 0).backward()
        for call in (lambda: a.clip_grad_norm_(manual.model.parameters(), 1.0),
                     lambda: a.clip_grad_value_(manual.model.parameters(), 1.0)):  # fmt: skip
            with pytest.raises(REFUSED, match="not final"):
                call()
        manual.finalize()
        manual.wait()
        want = whole(manual.model)
        assert a.clip_grad_norm_(manual.model.parameters(), 1e9).item() == pytest.approx(want, rel=1e-5)


# --- what else is new in the ways of reducing --------------------------------------------------------------


def lazily() -> nn.Module:
    kwargs: Any = {"lazy_bucket_allocation": True}
    return DistributedDataParallel(mlp(), **kwargs)


def with_wider_gradients() -> nn.Module:
    model = mlp().bfloat16()
    for p in model.parameters():
        p.grad_dtype = torch.float32
    return fully_shard(model, mesh=mesh1(2))


def reduced_in_the_gradients_dtype() -> nn.Module:
    model = mlp()
    for p in model[0].parameters():
        p.grad_dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=None)
    return fully_shard(model, mesh=mesh1(2), mp_policy=policy)


def some_parameters_whole() -> nn.Module:
    model = mlp()
    kept = {id(p) for p in model[2].parameters()}
    kwargs: Any = {"param_dtype_override_fn": lambda p: torch.float32 if id(p) in kept else None}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False, **kwargs)
    model = nn.Sequential(*(Cast(layer) for layer in model))
    return fully_shard(model, mesh=mesh1(2), mp_policy=policy)


class Cast(nn.Module):
    """Inputs in the dtype of the weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x.to(self.layer.weight.dtype))
        return found


@pytest.mark.parametrize("way", ["clip", "clip, overlap", "step", "step, overlap", "function", "list"])
@pytest.mark.parametrize(
    "make", [lazily, with_wider_gradients, reduced_in_the_gradients_dtype, some_parameters_whole]
)
@on_ranks(2)
def test_57_reduced_otherwise(rank: int, make: Callable[[], nn.Module], way: str) -> None:
    torch.manual_seed(0)
    model = make()
    clip = Way(way, model)
    dtype = next(model.parameters()).dtype
    for step in range(5):
        model.zero_grad()
        x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4) * (1 + rank + step)
        model(x).float().square().mean().backward()
        want = whole(model)
        assert clip().item() == pytest.approx(want, rel=1e-4)
        assert whole(model) == pytest.approx(min(want, BOUND), rel=1e-2)
