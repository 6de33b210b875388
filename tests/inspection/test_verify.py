"""describe() and verify(): what is counted, and what is miscounted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from tests import oracle
from tests.harness import on_ranks, on_row
from tests.layouts import LAYOUTS, mesh1, mesh2, plain


@on_row(LAYOUTS)
def test_every_row_verifies(row: str) -> float:
    case = LAYOUTS[row].build()
    case.backward(5)
    clipper = distclip.Clipper(case.parameters, distclip.GlobalNorm(1e9), **case.kwargs)
    found = clipper.verify()
    assert found == pytest.approx(oracle.norm(case.dense().values()), rel=1e-6)
    assert found == pytest.approx(clipper.clip().total_norm.item(), rel=1e-6)
    description = clipper.describe()
    assert len(description.rows) == len(clipper.plan.positions)
    if description.elements is not None and "fsdp1" not in row:
        assert description.counted == description.elements
    assert f"{description.counted:,}" in str(description)
    return found


def _with_gradients(parameters: dict[str, nn.Parameter], **different: float) -> None:
    for name, p in parameters.items():
        generator = torch.Generator().manual_seed(7)
        p.grad = torch.randn(p.shape, generator=generator) * different.get(name, 1.0)


@on_ranks(2)
def test_a_replica_declared_sharded_is_over_counted(rank: int) -> None:
    mesh = mesh1(2, "tp")
    parameters = {"right": plain(3, 4), "wrong": plain(5, 2)}
    distclip.declare(parameters["wrong"], sharded_over=mesh)
    _with_gradients(parameters)
    clipper = distclip.Clipper(parameters.items(), distclip.GlobalNorm(1.0))
    with pytest.raises(distclip.OwnershipError, match=r"'wrong': over-counted along tp: ranks \[0, 1\]") as e:
        clipper.verify()
    assert "right" not in str(e.value)


@on_ranks(4)
def test_shards_declared_over_the_wrong_axis(rank: int) -> None:
    """Over-counted along the axis that was declared, under-counted along the one that was not."""
    mesh = mesh2(2, 2, "dp", "tp")
    parameters = {"a": plain(3, 4), "b": plain(5, 2)}
    distclip.declare(parameters["a"], sharded_over=mesh["tp"])
    distclip.declare(parameters["b"], sharded_over=mesh["dp"])
    clipper = distclip.Clipper(parameters.items(), distclip.GlobalNorm(1.0))
    assert clipper.plan.multiplicities == (2, 2)  # made before there are gradients to tell
    coordinate = mesh["tp"].get_local_rank()
    _with_gradients(parameters, a=1.0 + coordinate, b=1.0 + coordinate)
    with pytest.raises(distclip.OwnershipError) as e:
        clipper.verify()
    assert "'b': under-counted along tp" in str(e.value)
    assert "'b': over-counted along dp" in str(e.value)
    assert "'a'" not in str(e.value)


@on_ranks(2)
def test_unsynchronised_replicas_are_under_counted(rank: int) -> None:
    parameters = {"fine": plain(3, 4), "drifted": plain(5, 2)}
    clipper = distclip.Clipper(parameters.items(), distclip.GlobalNorm(1.0))
    assert clipper.plan.group is None
    _with_gradients(parameters, drifted=1.0 + rank)
    with pytest.raises(distclip.OwnershipError, match="'drifted': under-counted: ranks 0 and 1"):
        clipper.verify()


@on_ranks(2)
def test_describe(rank: int) -> None:
    mesh = mesh1(2, "tp")
    named = {"norm": plain(4), "up": plain(3, 4)}
    distclip.declare(named["up"], sharded_over=mesh)
    if rank == 1:
        named["up"].data.add_(1)
    text = str(distclip.Clipper(named.items(), distclip.GlobalNorm(1.0)).describe())
    assert "declared sharded over tp" in text
    assert "28 elements counted" in text  # 4 once, 12 on each of two ranks
    header, _, norm, up, _ = text.splitlines()
    assert header.split() == ["parameter", "shape", "dtype", "placement", "ranks", "held", "by"]
    assert norm.split()[-2:] == ["2", "2"]
    assert up.split()[-2:] == ["2", "1"]
    assert dist.get_world_size() == 2
