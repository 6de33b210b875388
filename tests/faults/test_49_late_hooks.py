"""49: a hook that changes ``.grad`` in backward behind the clipper's own, also of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.measure import overlap
from tests import oracle
from tests.harness import on_ranks
from tests.layouts import mesh1

LARGE = 1 << 20


def model_of(sizes: str) -> nn.Sequential:
    torch.manual_seed(4)
    shapes = {
        "large": [(1024, 1024)],
        "small": [(8, 4), (4, 8), (8, 8)],
        "large in the middle": [(8, 1024), (1024, 1032), (1032, 4)],
        "large and last": [(1024, 1024), (1024, 8)],
        "large and first": [(8, 1024), (1024, 1024)],
    }[sizes]
    return nn.Sequential(*(nn.Linear(i, o, bias=sizes == "small") for i, o in shapes))


SIZES = ["large", "small", "large in the middle", "large and last", "large and first"]
assert overlap._BATCH == LARGE


def scales(p: Any) -> None:
    p.grad.mul_(0.25)


def scales_data(p: Any) -> None:
    p.grad.data.mul_(0.25)


def replaces(p: Any) -> None:
    p.grad = p.grad * 4


def Value(p: Any) -> None:
    """distclip's own."""


def takes_away(p: Any) -> None:
    p.grad = None


HOOKS: dict[str, Callable[[Any], None]] = {
    f.__name__: f for f in (scales, scales_data, replaces, takes_away, Value)
}


def run(model: Any, hook: str, of: str, *, before: bool, rank: int = 0) -> list[float]:
    parameters = list(model.parameters())
    chosen = {"all": parameters, "first": parameters[:1], "last": parameters[-1:]}[of]

    def register() -> Any:
        if hook == "Value":
            return distclip.hooks.clip_value(model, 1e-3, when="accumulated")
        return [p.register_post_accumulate_grad_hook(HOOKS[hook]) for p in chosen]

    keep = register() if before else None
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1e9), overlap=True)
    norms = []
    for step in range(3):
        model.zero_grad()
        x = torch.randn(2, parameters[0].shape[1], generator=torch.Generator().manual_seed(step + 9 * rank))
        model(x).square().sum().backward()
        want = oracle.norm(oracle.dense_gradients(parameters))
        assert clipper.clip().total_norm.item() == pytest.approx(want, rel=1e-5), step
        norms.append(want)
        if step == 0 and not before:  # the first clip has made the plan, and with it the clipper's hooks
            keep = register()
            norms.clear()
    assert keep
    return norms


@pytest.mark.parametrize("of", ["all", "first", "last"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_49_in_one_process(sizes: str, hook: str, before: bool, of: str) -> None:
    run(model_of(sizes), hook, of, before=before)


def sharded(model: nn.Sequential) -> Any:
    for layer in model:
        fully_shard(layer, mesh=mesh1(2))
    return fully_shard(model, mesh=mesh1(2))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("sizes", ["small", "large and last"])
@pytest.mark.parametrize("wrapper", ["ddp", "ddp, views", "fsdp2"])
@on_ranks(2)
def test_49_on_two_ranks(rank: int, wrapper: str, sizes: str, hook: str, before: bool) -> list[float]:
    """DDP brings its averages into ``.grad`` after these hooks have run, and so undoes what they did."""
    model: Any = model_of(sizes)
    model = sharded(model) if wrapper == "fsdp2" else DDP(model, gradient_as_bucket_view="views" in wrapper)
    return run(model, hook, "all", before=before, rank=rank)
