"""37: FSDP1's parameters are read from its handles, whatever the module shows in their place just now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

import distclip
from tests import oracle
from tests.faults.ways import BOUND
from tests.harness import on_ranks
from tests.layouts import mesh2

SHARDED = {
    "FULL_SHARD": ShardingStrategy.FULL_SHARD,
    "SHARD_GRAD_OP": ShardingStrategy.SHARD_GRAD_OP,
    "NO_SHARD": ShardingStrategy.NO_SHARD,
}
HYBRID = {
    "HYBRID_SHARD": ShardingStrategy.HYBRID_SHARD,
    "_HYBRID_SHARD_ZERO2": ShardingStrategy._HYBRID_SHARD_ZERO2,
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 5))


def wrapped(strategy: ShardingStrategy, **kwargs: Any) -> FSDP1:
    """The inner layer by itself, and the rest."""
    model = mlp()
    kwargs = {"device_id": torch.device("cpu"), "sharding_strategy": strategy, **kwargs}
    model[1] = FSDP1(model[1], **kwargs)
    return FSDP1(model, **kwargs)


def x() -> Tensor:
    return torch.full((2, 4), 1.0 + dist.get_rank())


def backward(m: Any) -> None:
    m(x()).float().square().sum().backward()


def nothing(m: FSDP1) -> None:
    """Only backward."""


def forward(m: FSDP1) -> None:
    m(x())


def forward_without_grad(m: FSDP1) -> None:
    with torch.no_grad():
        m(x())


def evaluated(m: FSDP1) -> None:
    m.eval()
    forward_without_grad(m)
    m.train()


def summoned(m: FSDP1) -> None:
    with FSDP1.summon_full_params(m):
        assert sum(p.numel() for p in m.parameters()) >= 6


def summoned_one(m: FSDP1) -> None:
    with FSDP1.summon_full_params(m, recurse=False, writeback=False):
        pass


def saved(m: FSDP1) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NO_SHARD says that it returns the whole
        m.state_dict()


def backward_again(m: FSDP1) -> None:
    backward(m)


BETWEEN = {
    f.__name__: f
    for f in (
        nothing,
        forward,
        forward_without_grad,
        evaluated,
        summoned,
        summoned_one,
        saved,
        backward_again,
    )
}


def averaged() -> float:
    """The norm of the gradient that all ranks have together, of the model as it is without FSDP1."""
    m = mlp().double()
    m(x().double()).square().sum().backward()
    for p in m.parameters():
        dist.all_reduce(p.grad)
    return oracle.norm(p.grad / dist.get_world_size() for p in m.parameters() if p.grad is not None)


def check(m: FSDP1, between: Callable[[FSDP1], None], accuracy: float = 1e-5, steps: int = 4) -> None:
    want = averaged() * (2 if between is backward_again else 1)
    assert want > 4 * BOUND
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    ways: list[Callable[[], Any]] = [
        lambda: clipper.clip().total_norm,
        lambda: distclip.clip_grad_norm_(m, BOUND),
        lambda: distclip.total_grad_norm([m]),
    ]
    for way in (*ways, ways[0])[:steps]:
        optimizer.zero_grad()  # and not the module's, which may show views in place of its parameters
        backward(m)
        between(m)
        assert way().item() == pytest.approx(want, rel=accuracy)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", SHARDED)
@on_ranks(2)
def test_37_between_backward_and_clip(rank: int, strategy: str, use_orig_params: bool) -> None:
    for between in BETWEEN.values():
        check(wrapped(SHARDED[strategy], use_orig_params=use_orig_params), between)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", HYBRID)
@on_ranks(4)
def test_37_hybrid(rank: int, strategy: str, use_orig_params: bool) -> None:
    mesh = mesh2(2, 2, "replicate", "shard")
    for between in (nothing, forward, backward_again):
        check(wrapped(HYBRID[strategy], use_orig_params=use_orig_params, device_mesh=mesh), between)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("kind", ["mixed precision", "bfloat16 gradients"])
@on_ranks(2)
def test_37_precision(rank: int, kind: str, use_orig_params: bool) -> None:
    kwargs: dict[str, Any] = {
        "mixed precision": {
            "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        },
        "bfloat16 gradients": {
            "mixed_precision": MixedPrecision(
                param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, keep_low_precision_grads=True
            )
        },
    }[kind]
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        for between in (nothing, forward):
            m = wrapped(strategy, use_orig_params=use_orig_params, **kwargs)
            # With mixed precision a forward pass that has no backward pass leaves torch in a state in which
            # the next backward pass synchronises nothing.
            check(m, between, accuracy=3e-2, steps=1 if between is forward else 4)


@pytest.mark.parametrize("strategy", [k for k in SHARDED if k != "NO_SHARD"])
@on_ranks(2)
def test_37_lists(rank: int, strategy: str) -> None:
    """Taken before wrapping, and after it: right or refused, on both ranks."""
    for before in (True, False):
        for seen in (True, False):
            model = mlp()
            early = list(model.parameters())
            m = FSDP1(
                model,
                use_orig_params=True,
                device_id=torch.device("cpu"),
                sharding_strategy=SHARDED[strategy],
            )
            given = early if before else list(m.parameters())
            want = averaged()
            backward(m)
            if seen:
                assert distclip.total_grad_norm(m).item() == pytest.approx(want, rel=1e-5)
                assert distclip.clip_grad_norm_(given, BOUND).item() == pytest.approx(want, rel=1e-5)
            else:
                with pytest.raises(distclip.OwnershipError, match="pass the FSDP module itself"):
                    distclip.clip_grad_norm_(given, BOUND)


@on_ranks(2)
def test_37_accumulated(rank: int) -> None:
    """Several backward passes, of which the last is synchronised."""
    for use_orig_params in (True, False):
        m = wrapped(ShardingStrategy.FULL_SHARD, use_orig_params=use_orig_params)
        norms = []
        for clip in (lambda m=m: m.clip_grad_norm_(1e9), lambda m=m: distclip.clip_grad_norm_(m, BOUND)):  # type: ignore[misc]
            m.zero_grad()
            for i in range(3):
                with nullcontext() if i == 2 else m.no_sync():
                    backward(m)
            norms.append(clip().item())
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
