"""What goes wrong elsewhere (the numbers are those of the table of failures), and does not here.

Where torch shows the failure cheaply and without a hang, the test shows it first.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from tests import oracle
from tests.counting import count_calls
from tests.harness import on_ranks
from tests.layouts import mesh1, mesh2
from tests.starting import TORCH

torch_norm_ = torch.nn.utils.clip_grad_norm_
torch_value_ = torch.nn.utils.clip_grad_value_


def planted(gradient: Tensor, mesh: DeviceMesh | None = None, *placements: Any) -> Tensor:
    """A parameter with that (whole) gradient: plain, or distributed."""
    if mesh is None:
        parameter = nn.Parameter(torch.ones_like(gradient))
        parameter.grad = gradient.clone()
        return parameter
    parameter = nn.Parameter(distribute_tensor(torch.ones_like(gradient), mesh, placements))
    parameter.grad = distribute_tensor(gradient, mesh, placements)
    return parameter


def norm_of(*tensors: Tensor, p: float = 2.0) -> float:
    return oracle.norm(oracle.dense_gradients(tensors), p)


# --- 1 and 2: mixtures ---------------------------------------------------------------------------------


@on_ranks(4)
def test_failure_01_different_meshes(rank: int) -> list[float]:
    """`All operands in aten.stack.default must have the same mesh` (pytorch#180346)."""
    mesh = mesh2(2, 2, "dp", "tp")
    linear, norm = (
        planted(torch.randn(4, 6), mesh, Shard(0), Shard(1)),
        planted(torch.randn(5), mesh["dp"], Shard(0)),
    )
    with pytest.raises((RuntimeError, ValueError), match="mesh"):
        torch_norm_([linear, norm], 1.0)
    want = norm_of(linear, norm)
    total = distclip.clip_grad_norm_([linear, norm], 1.0)
    assert total.item() == pytest.approx(want, rel=1e-6)
    assert norm_of(linear, norm) == pytest.approx(1.0, rel=1e-5)
    return [total.item()]


@on_ranks(2)
def test_failure_02_dtensor_beside_plain(rank: int) -> list[float]:
    """`got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor`."""
    sharded, plain = planted(torch.randn(5, 3), mesh1(2), Shard(0)), planted(torch.randn(4))
    for clip in (torch_norm_, torch_value_):
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            clip([sharded, plain], 0.1)
    want = norm_of(sharded, plain)
    total = distclip.clip_grad_norm_([sharded, plain], 1.0)
    assert total.item() == pytest.approx(want, rel=1e-6)
    assert norm_of(sharded, plain) == pytest.approx(1.0, rel=1e-5)
    distclip.clip_grad_value_([sharded, plain], 0.125)
    assert norm_of(sharded, p=math.inf) == norm_of(plain, p=math.inf) == 0.125
    return [total.item()]


# --- 4: counted several times --------------------------------------------------------------------------


@on_ranks(2)
def test_failure_04_replicas_in_a_naive_sum(rank: int) -> None:
    """Squares summed over the tensor-parallel group count a replicated bias on every rank: 5.29 for 4.90."""
    sharded, bias = planted(torch.ones(4, 5), mesh1(2, "tp"), Shard(0)), planted(torch.ones(4))
    squares = sharded.grad._local_tensor.square().sum() + bias.grad.square().sum()  # type: ignore[union-attr]
    dist.all_reduce(squares)
    assert f"{squares.sqrt():.2f}" == "5.29"
    assert f"{distclip.total_grad_norm([sharded, bias]):.2f}" == "4.90"


def test_failure_04_same_parameter_twice() -> None:
    """torch counts it twice, and multiplies its gradient twice."""
    w = planted(torch.tensor([3.0, 4.0]))
    assert torch_norm_([w, w], 1.0).item() == pytest.approx(5 * math.sqrt(2))
    assert norm_of(w) == pytest.approx(0.1, rel=1e-3)  # where 1.0 was asked for
    w = planted(torch.tensor([3.0, 4.0]))
    assert distclip.clip_grad_norm_([w, w], 1.0).item() == 5.0
    assert norm_of(w) == pytest.approx(1.0, rel=1e-5)


# --- 5: missing gradients ------------------------------------------------------------------------------


@on_ranks(2)
def test_failure_05_gradients_missing_on_one_rank(rank: int) -> list[float]:
    """torch's collectives then pair up wrongly: a hang, or another norm on every rank."""
    a, b = (planted(torch.full((4, 3), x), mesh1(2), Shard(0)) for x in (1.0, 2.0))
    totals = [distclip.total_grad_norm([a, b])]
    if rank == 1:
        b.grad = None
    totals.append(distclip.clip_grad_norm_([a, b], 100.0))  # rank 0 alone has half of b
    if rank == 1:
        a.grad = None
    totals.append(distclip.clip_grad_norm_([a, b], 100.0))
    assert [t.item() ** 2 for t in totals] == pytest.approx([12 + 48, 12 + 24, 6 + 24])
    return [t.item() for t in totals]


@on_ranks(2)
def test_failure_05_module_that_one_rank_did_not_use(rank: int) -> list[float]:
    """Through FSDP2: one rank's gradients dropped after backward."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh1(2))
    clipper, totals = distclip.Clipper(model, distclip.GlobalNorm(0.1)), []
    for step in range(3):
        model.zero_grad()
        model(torch.randn(3, 4)).pow(2).sum().backward()
        if rank == step % 2:
            for p in model[step % 2].parameters():
                p.grad = None
        totals.append(clipper.clip().total_norm.item())
    return totals


# --- 6: the infinity norm ------------------------------------------------------------------------------


@on_ranks(2)
def test_failure_06_infinity_norm_over_an_empty_shard(rank: int) -> list[float]:
    """Linear(4, 1) on 2 ranks leaves one with nothing: there torch raises, and the other waits for ever."""
    with pytest.raises(RuntimeError, match="inf norm on an empty tensor"):
        torch.linalg.vector_norm(torch.empty(0, 4), math.inf)
    head = nn.Linear(4, 1)
    fully_shard(head, mesh=mesh1(2))
    assert head.weight._local_tensor.numel() == (4 if rank == 0 else 0)
    totals = []
    for scale in (10.0, 1.0, 1.0, 0.0):
        head.zero_grad()
        (scale * head(torch.tensor([[1.0, 2.0, 3.0, 0.5]]))).sum().backward()
        totals.append(distclip.clip_grad_norm_(head.parameters(), 1e4, math.inf).item())
    assert totals == [30.0, 3.0, 3.0, 0.0]
    return totals


@on_ranks(2)
def test_failure_06_infinity_norm_is_not_remembered(rank: int) -> list[float]:
    """FSDP1 reduces into a cached zero tensor: gradients of 10, 1, 1 come out as 10, 10, 10."""
    w = planted(torch.zeros(3), mesh1(2), Shard(0))
    clipper, totals = distclip.Clipper([w], distclip.GlobalNorm(100.0, "inf")), []
    for largest in (10.0, 1.0, 1.0):
        w.grad = distribute_tensor(torch.tensor([0.5, -largest, 0.0]), mesh1(2), [Shard(0)])
        totals.append(clipper.clip().total_norm.item())
    assert totals == [10.0, 1.0, 1.0]
    return totals


# --- 7: low precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "theirs", "mine"),
    [
        (torch.ones(4097, dtype=torch.bfloat16), 64.0, math.sqrt(4097)),
        (torch.full((3,), 2.953, dtype=torch.bfloat16), 5.125, 5.114963),
        (torch.full((100,), 1e4, dtype=torch.float16), math.inf, 1e5),
    ],
)
def test_failure_07_norm_in_the_gradients_precision(gradient: Tensor, theirs: float, mine: float) -> None:
    """A bf16 norm has 3 digits; an fp16 norm above 65504 is inf and sets every gradient to 0."""
    w = planted(gradient)
    assert torch_norm_([w], 1.0).item() == theirs
    w = planted(gradient)
    total = distclip.clip_grad_norm_([w], 1.0)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(mine, rel=1e-6)
    assert norm_of(w) == pytest.approx(1.0, rel=1e-2)


@on_ranks(2)
def test_failure_07_sharded(rank: int) -> list[float]:
    mesh = mesh1(2)
    ones = planted(torch.ones(4097, dtype=torch.bfloat16), mesh, Shard(0))
    large = planted(torch.full((100,), 1e4, dtype=torch.float16), mesh, Shard(0))
    totals = [distclip.total_grad_norm([ones]).item(), distclip.clip_grad_norm_([large], 1e5).item()]
    assert totals == pytest.approx([64.0078, 1e5], rel=1e-6)
    return totals


def test_failure_07_float64_on_request() -> None:
    """Squares beyond float32, in gradients that are not."""
    w = planted(torch.tensor([3e20, 4e20]))
    clipper = distclip.Clipper([w], distclip.GlobalNorm(1.0), accumulate=torch.float64)
    assert clipper.clip().total_norm.item() == pytest.approx(5e20)
    assert norm_of(w) == pytest.approx(1.0, rel=1e-5)


# --- 8: one bad rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@on_ranks(2)
def test_failure_08_error_if_nonfinite_on_every_rank(rank: int, bad: float, p: float) -> None:
    """Sharded over 2 ranks and bad on one: every rank raises, before any gradient is touched."""
    w = planted(torch.tensor([1.0, 2.0, 3.0, 4.0]), mesh1(2), Shard(0))
    local = w.grad._local_tensor  # type: ignore[union-attr]
    if rank == 1:
        local[0] = bad
    with pytest.raises(distclip.NonFiniteError):
        distclip.clip_grad_norm_([w], 1.0, p, error_if_nonfinite=True)
    assert local.tolist() == pytest.approx([1.0, 2.0] if rank == 0 else [bad, 4.0], nan_ok=True)


# --- 10: the first call --------------------------------------------------------------------------------


def many(mesh: DeviceMesh, count: int) -> list[Tensor]:
    tensors: list[Tensor] = []
    for i in range(count):
        p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Shard(0)], run_check=False))
        p.grad = DTensor.from_local(torch.full((4,), float(i % 3)), mesh, [Shard(0)], run_check=False)
        tensors.append(p)
    return tensors


@on_ranks(2)
def test_failure_10_no_cold_cliff(rank: int) -> None:
    """torch's first call over 1600 DTensor gradients takes 5.7 s (pytorch#169445)."""
    counts = []
    for _ in range(2):  # of fresh parameters
        tensors = many(mesh1(2), 1600)
        with count_calls() as calls:
            distclip.clip_grad_norm_(tensors, 1.0)
        counts.append(calls.count / len(tensors))
    assert max(counts) < 200, counts  # calls a gradient; 142


@on_ranks(2)
def test_failure_10_a_gradient_count_that_changes(rank: int) -> list[float]:
    """torch is as slow again whenever the number of gradients changes."""
    tensors = many(mesh1(2), 1600)
    distclip.total_grad_norm(tensors)
    counts, totals = [], []
    for step in range(4):
        for p in tensors[step :: 7 + step]:
            p.grad = None
        want = math.sqrt(sum(8.0 * (i % 3) ** 2 for i, p in enumerate(tensors) if p.grad is not None))
        with count_calls() as calls:
            totals.append(distclip.total_grad_norm(tensors).item())
        counts.append(calls.count / len(tensors))
        assert totals[-1] == pytest.approx(want, rel=1e-6)
    assert max(counts) < 25, counts  # calls a gradient; 14
    return totals


# --- 13: what comes back -------------------------------------------------------------------------------


@on_ranks(2)
def test_failure_13_the_norm_is_a_plain_number(rank: int) -> str:
    """torch returns a DTensor here: f-strings, .numpy() and all_reduce on it fail."""
    w = planted(torch.tensor([3.0, 0.0, 4.0]), mesh1(2), Shard(0))
    theirs = torch.nn.utils.get_total_norm([w.grad])  # type: ignore[list-item]
    assert isinstance(theirs, DTensor)
    for norm in (distclip.total_grad_norm([w]), distclip.clip_grad_norm_([w], 100.0)):
        assert type(norm) is Tensor
        assert (norm.dtype, norm.shape, norm.requires_grad) == (torch.float32, (), False)
        assert norm.numpy() == 5.0
        mean = norm / 2
        dist.all_reduce(mean)
        assert mean.item() == 5.0
    return f"{norm:.3f}"


# --- 14: silent no-ops ---------------------------------------------------------------------------------

NORM_CALLS: dict[str, Any] = {
    "clip_grad_norm_": distclip.clip_grad_norm_,
    "GlobalNorm": lambda w, max_norm, p=2.0: distclip.Clipper(w, distclip.GlobalNorm(max_norm, p)).clip(),
    "PerParameter": lambda w, max_norm, p=2.0: distclip.Clipper(
        w, distclip.PerParameter(max_norm, norm_type=p)
    ).clip(),
    "PerGroup": lambda w, max_norm, p=2.0: distclip.Clipper(
        w, distclip.PerGroup({"*": max_norm}, norm_type=p)
    ).clip(),
}


@pytest.mark.parametrize("call", NORM_CALLS)
@pytest.mark.parametrize("max_norm", [-1, -1e-9, math.nan, "one", None])
def test_failure_14_max_norm(call: str, max_norm: Any) -> None:
    """torch flips the gradient's sign for -1, and sets it to NaN for nan."""
    w = planted(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=rf"max_norm.*{max_norm}"):
        NORM_CALLS[call]([w], max_norm)
    assert w.grad.tolist() == [3.0, 4.0]  # type: ignore[union-attr]
    if max_norm == -1:
        torch_norm_([w], max_norm)
        assert w.grad.tolist() == pytest.approx([-0.6, -0.8])  # type: ignore[union-attr]


@pytest.mark.parametrize("call", NORM_CALLS)
@pytest.mark.parametrize("p", [0, 4, -1, -math.inf, math.nan, "fro", None])
def test_failure_14_norm_type(call: str, p: Any) -> None:
    """For p = 0 torch returns the number of tensors, and clips by it."""
    w = planted(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=rf"norm_type={p!r}"):
        NORM_CALLS[call]([w], 1.0, p)
    assert w.grad.tolist() == [3.0, 4.0]  # type: ignore[union-attr]
    assert torch_norm_([w], 9.0, 0).item() == 1.0


@pytest.mark.parametrize("p", [2, "2", "inf", math.inf, 0.5, True])
def test_failure_14_norm_types_that_are_meant(p: Any) -> None:
    w = planted(torch.tensor([3.0, 4.0]))
    assert distclip.clip_grad_norm_([w], 100.0, p).item() == pytest.approx(norm_of(w, p=float(p)))


@pytest.mark.parametrize("bound", [-0.5, math.nan, "half"])
def test_failure_14_clip_value(bound: Any) -> None:
    """torch clamps to [0.5, -0.5]: every element becomes -0.5."""
    w = planted(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=rf"clip_value.*{bound}"):
        distclip.clip_grad_value_([w], bound)
    with pytest.raises(ValueError, match=rf"clip_value.*{bound}"):
        distclip.Value(bound)
    assert w.grad.tolist() == [3.0, 4.0]  # type: ignore[union-attr]


SOURCE_CALLS: dict[str, Any] = {
    "clip_grad_norm_": lambda source: distclip.clip_grad_norm_(source, 1.0),
    "clip_grad_value_": lambda source: distclip.clip_grad_value_(source, 1.0),
    "total_grad_norm": lambda source: distclip.total_grad_norm(source),
    "Clipper": lambda source: distclip.Clipper(source, distclip.GlobalNorm(1.0)).clip(),
}


@pytest.mark.parametrize("call", SOURCE_CALLS)
def test_failure_14_gradients_for_parameters(call: str) -> None:
    """torch finds no .grad on them, returns 0 and clips nothing."""
    w = planted(torch.tensor([3.0, 4.0]))
    assert torch_norm_([w.grad], 1.0).item() == 0.0  # type: ignore[list-item]
    with pytest.raises(ValueError, match="gradient seems to have been passed"):
        SOURCE_CALLS[call]([w.grad])


@pytest.mark.parametrize("call", SOURCE_CALLS)
def test_failure_14_exhausted_iterator(call: str) -> None:
    """`params = model.parameters()`, first given to the optimizer: torch clips nothing."""
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    for consumed in (model.parameters(), model.named_parameters(), filter(None, []), iter([])):
        list(consumed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of generators, not of other iterators
            assert torch_norm_(consumed, 1.0).item() == 0.0  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="consumed before"):
            SOURCE_CALLS[call](consumed)


@pytest.mark.parametrize("call", SOURCE_CALLS)
def test_failure_14_named_parameters(call: str) -> None:
    """`'tuple' object has no attribute 'grad'`: but what is meant is clear."""
    model = nn.Linear(2, 2)
    model(torch.full((1, 2), 9.0)).sum().backward()
    with pytest.raises(AttributeError, match="tuple"):
        torch_norm_(model.named_parameters(), 1.0)  # type: ignore[arg-type]
    SOURCE_CALLS[call](model.named_parameters())
    assert call == "total_grad_norm" or norm_of(*model.parameters(), p=math.inf) <= 1.0


def test_failure_14_weight_norm_for_gradient_norm() -> None:
    """torch's get_total_norm(model.parameters()) is the norm of the weights."""
    w = planted(torch.tensor([3.0, 4.0]))
    assert torch.nn.utils.get_total_norm([w]).item() == pytest.approx(math.sqrt(2))
    assert distclip.total_grad_norm([w]).item() == 5.0


# --- 16: value clipping --------------------------------------------------------------------------------


@on_ranks(2)
def test_failure_16_partial(rank: int) -> list[float]:
    """The elements to bound are those of the sum; torch refuses a gradient that still waits for it (2.13),
    or clamps what each rank contributes (2.11)."""
    mesh = mesh1(2)
    w = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    contribution = torch.tensor([0.75, -0.75, 3.0]) if rank == 0 else torch.tensor([0.75, 0.5, -3.0])
    w.grad = DTensor.from_local(contribution.clone(), mesh, [Partial()], run_check=False)
    with contextlib.suppress(RuntimeError):
        torch_value_([w], 1.0)
    assert w.grad.full_tensor().tolist() == [1.5, -0.25, 0.0]  # 1.0 is right
    w.grad = DTensor.from_local(contribution, mesh, [Partial()], run_check=False)
    distclip.clip_grad_value_([w], 1.0)
    assert w.grad.placements == (Replicate(),)
    assert w.grad.to_local().tolist() == [1.0, -0.25, 0.0]
    return w.grad.to_local().tolist()


def test_failure_16_complex_by_magnitude() -> None:
    """`clamp is not supported for complex types`."""
    w = planted(torch.tensor([3 + 4j, 0.3 - 0.4j, -5j, 0j]))
    with pytest.raises(NotImplementedError, match="complex"):
        torch_value_([w], 1.0)
    distclip.clip_grad_value_([w], 1.0)
    torch.testing.assert_close(w.grad, torch.tensor([0.6 + 0.8j, 0.3 - 0.4j, -1j, 0j]))


def embedding() -> nn.Embedding:
    """Row 1 is looked up twice, so its gradient comes in two pieces: (4, 4) and (2, 2)."""
    embedding = nn.Embedding(5, 2, sparse=True)
    weight = torch.tensor([[4.0], [2.0], [0.25]])
    (embedding(torch.tensor([1, 1, 3])) * weight).sum().backward()
    assert embedding.weight.grad is not None
    assert not embedding.weight.grad.is_coalesced()
    return embedding


def test_failure_16_sparse() -> None:
    """`Could not run 'aten::clamp_min_' with arguments from the 'SparseCPU' backend`."""
    e = embedding()
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        torch_value_(e.parameters(), 5.0)
    distclip.clip_grad_value_(e, 5.0)  # 4 + 2 is clamped, not 4 and 2
    assert e.weight.grad.is_sparse  # type: ignore[union-attr]
    assert e.weight.grad.to_dense()[:, 0].tolist() == [0.0, 5.0, 0.0, 0.25, 0.0]  # type: ignore[union-attr]


@on_ranks(2)
def test_failure_16_under_fsdp2(rank: int) -> list[float]:
    """Accelerate refuses it."""
    model = nn.Linear(3, 5)
    fully_shard(model, mesh=mesh1(2))
    model(torch.full((1, 3), float(1 + rank))).sum().backward()  # 1.5 after averaging; the bias 1
    distclip.clip_grad_value_(model, 1.25)
    got = [g.flatten().tolist() for g in oracle.dense_gradients(model.parameters()) if g is not None]
    assert got == [[1.25] * 15, [1.0] * 5]
    return got[0]


# --- 17: sparse and expanded gradients -----------------------------------------------------------------


def test_failure_17_sparse() -> None:
    """`Could not run 'aten::linalg_vector_norm' with arguments from the 'SparseCPU' backend`."""
    e = embedding()
    if TORCH < (2, 15):  # which has mended it
        with pytest.raises(NotImplementedError, match="SparseCPU"):
            torch_norm_(e.parameters(), 1.0)
    want = norm_of(e.weight)
    assert want == pytest.approx(math.sqrt(2 * (6**2 + 0.25**2)))
    assert distclip.clip_grad_norm_(e.parameters(), 1.0).item() == pytest.approx(want, rel=1e-6)
    assert norm_of(e.weight) == pytest.approx(1.0, rel=1e-5)
    before = e.weight.detach().clone()
    torch.optim.SGD(e.parameters(), 1.0).step()
    assert (before - e.weight).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_failure_17_sparse_below_the_threshold() -> None:
    e = embedding()
    gradient = e.weight.grad
    distclip.clip_grad_norm_(e, 100.0)
    assert e.weight.grad is gradient
    assert not gradient.is_coalesced()  # type: ignore[union-attr]


def test_failure_17_sparse_without_any_row() -> None:
    e = nn.Embedding(5, 2, sparse=True)
    e(torch.empty(0, dtype=torch.int64)).sum().backward()
    for p in (0.5, 2.0, math.inf):
        assert distclip.clip_grad_norm_(e, 1.0, p).item() == 0.0


@pytest.mark.parametrize("grad", ["expanded", "backward"])
def test_failure_17_expanded(grad: str) -> None:
    """`more than one element of the written-to tensor refers to a single memory location`."""
    w = nn.Parameter(torch.ones(2, 8))
    (4 * w).sum().backward()
    if grad == "expanded":
        (w.grad,) = torch.autograd.grad(4 * w.sum(), [w])
        assert w.grad.stride() == (0, 0)
        with pytest.raises(RuntimeError, match="single memory location"):
            torch_norm_([w], 1.0)
    assert distclip.clip_grad_norm_([w], 1.0).item() == 16.0
    torch.testing.assert_close(w.grad, torch.full((2, 8), 0.25))
    distclip.clip_grad_value_([w], 0.125)
    assert w.grad.unique().tolist() == [0.125]  # type: ignore[union-attr]


@on_ranks(2)
def test_failure_17_expanded_dtensor(rank: int) -> list[float]:
    mesh = mesh1(2)
    w = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
    local = torch.ones(1, 1).expand(3, 2)
    w.grad = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    total = distclip.clip_grad_norm_([w], 0.5)
    assert total.item() == pytest.approx(math.sqrt(12), rel=1e-6)
    assert norm_of(w) == pytest.approx(0.5, rel=1e-5)
    assert local.unique().tolist() == [1.0]
    return [total.item()]
