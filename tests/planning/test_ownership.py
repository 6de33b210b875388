"""Which rank holds what is never guessed: replicas are recognised, everything else is an error on every
rank; and whose plan is whose."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import kernels
from distclip.current import known
from distclip.layout import scope
from tests import oracle
from tests.harness import let_go, on_ranks
from tests.layouts import mesh1

Named = list[tuple[str, Tensor]]


def parameter(value: Tensor, gradient: Tensor | None = None) -> nn.Parameter:
    parameter = nn.Parameter(value.clone())
    parameter.grad = None if gradient is None else gradient.clone()
    return parameter


def replicas() -> Named:
    """The same on every rank."""
    torch.manual_seed(5)
    return [(name, parameter(torch.randn(6, 4), torch.randn(6, 4))) for name in ("first", "second", "third")]


# --- plain parameters that differ ----------------------------------------------------------------------


def in_value(named: Named, rank: int) -> None:
    named[1][1].data.add_(rank)


def in_value_of_one_element(named: Named, rank: int) -> None:
    named[1][1].data[3, 2] += 5 * rank


def in_sign(named: Named, rank: int) -> None:
    named[1][1].data.mul_(1 - 2 * rank)


def in_scale(named: Named, rank: int) -> None:
    named[1][1].data.mul_(1 + 0.1 * rank)


def in_order_of_rows(named: Named, rank: int) -> None:
    named[1][1].data = named[1][1].data.roll(rank, 0)


def in_gradient_only(named: Named, rank: int) -> None:
    named[1][1].grad.add_(rank)  # type: ignore[union-attr]


def in_shape(named: Named, rank: int) -> None:
    named[1] = ("second", parameter(torch.ones(2 + rank, 3)))


def in_dtype(named: Named, rank: int) -> None:
    named[1] = ("second", parameter(torch.ones(6, 4, dtype=(torch.float32, torch.float64)[rank])))


def in_name(named: Named, rank: int) -> None:
    named[1] = (("second", "zweiter")[rank], named[1][1])


DIFFERENCES: list[Callable[[Named, int], None]] = [
    in_value,
    in_value_of_one_element,
    in_sign,
    in_scale,
    in_order_of_rows,
    in_gradient_only,
    in_shape,
    in_dtype,
    in_name,
]


def refused(parameters: object, *says: str) -> None:
    """Every public call raises on this rank, says so, and leaves the gradients alone."""
    for call in (
        lambda: distclip.total_grad_norm(parameters),  # type: ignore[arg-type]
        lambda: distclip.clip_grad_norm_(parameters, 1e-3),  # type: ignore[arg-type]
        lambda: distclip.Clipper(parameters, distclip.PerParameter(1e-3)).clip(),  # type: ignore[arg-type]
    ):
        with pytest.raises(distclip.OwnershipError) as error:
            call()
        for words in (*says, "declare(", "stages=", "FSDP module", "process_group="):
            assert words in str(error.value), words


@pytest.mark.parametrize("differ", [f.__name__ for f in DIFFERENCES])
@on_ranks(2)
def test_plain_parameters_that_differ(rank: int, differ: str) -> None:
    named = replicas()
    globals()[differ](named, rank)
    before = [None if p.grad is None else p.grad.clone() for _, p in named]
    refused(named, named[1][0], f"on rank {rank}")
    for (_, p), gradient in zip(named, before, strict=True):
        assert (p.grad is None and gradient is None) or torch.equal(p.grad, gradient)  # type: ignore[arg-type]


@on_ranks(2)
def test_a_difference_in_count(rank: int) -> None:
    refused(replicas()[: 2 + rank], "Number 2 is", "2 on some, 3 on others", f"{2 + rank} on rank {rank}")


@on_ranks(4)
def test_a_difference_on_one_of_four(rank: int) -> None:
    named = replicas()
    if rank == 2:
        in_value(named, rank)
    refused(named, "second")


@pytest.mark.parametrize("lacking", [None, 1])
@on_ranks(2)
def test_replicas_add_with_the_same_kernels(rank: int, lacking: int | None) -> None:
    """Where Triton's cannot run on one rank, they do on none. (The CPU stands for a GPU.)"""
    device = torch.device("cpu")
    runs = kernels._in_triton
    with (
        mock.patch.dict(runs, {device: rank != lacking}),
        mock.patch.object(kernels, "all_in_triton", lambda devices: all(map(runs.get, devices))),
    ):
        _ = distclip.Clipper([nn.Parameter(torch.ones(3))], distclip.GlobalNorm(1.0)).plan
        assert runs[device] == (lacking is None)


@on_ranks(2)
def test_zero_shards(rank: int) -> None:
    """LoRA's B, split over ranks: equal while all is zero, but not the gradients."""
    torch.manual_seed(rank)
    named = [("lora_B", parameter(torch.zeros(4, 2), torch.randn(4, 2)))]
    refused(named, "gradient", "lora_B")


@on_ranks(2)
def test_unsynchronised_replicas(rank: int) -> None:
    """Clipping inside DDP's no_sync: elsewhere a coefficient of its own on every rank."""
    model = DistributedDataParallel(nn.Linear(4, 3))
    with model.no_sync():
        model(torch.full((2, 4), 1.0 + rank)).pow(2).sum().backward()
    refused(model, "no_sync()")


@on_ranks(2)
def test_plain_beside_sharded_that_differ(rank: int) -> None:
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh1(2), [Shard(0)]))
    experts = parameter(torch.full((3,), float(rank)))
    refused([("dense", sharded), ("experts", experts)], "experts")


@on_ranks(2)
def test_a_difference_outside_one_column(rank: int) -> None:
    """A first input feature that is always 0: the first column of every gradient is 0 on every rank."""
    torch.manual_seed(rank)
    gradient = torch.randn(512, 512)
    gradient[:, 0] = 0
    refused([("expert", parameter(torch.zeros(512, 512), gradient))], "gradient", "expert")


# --- what passes ---------------------------------------------------------------------------------------


@on_ranks(2)
def test_drifted_replicas_pass(rank: int) -> None:
    """Replicas kept alike by atomic additions or bf16 differ in their last digits."""
    named = replicas()
    torch.manual_seed(rank)
    for _, p in named:
        p.data.mul_(1 + 1e-4 * torch.randn_like(p))
        assert p.grad is not None
        p.grad.mul_(1 + 1e-4 * torch.randn_like(p))
    want = oracle.norm(oracle.dense_gradients(p for _, p in named))
    assert distclip.total_grad_norm(named).item() == pytest.approx(want, rel=1e-6)


@on_ranks(2)
def test_replicas_of_nothing_pass(rank: int) -> float:
    """Zeros, no gradients, a gradient on one rank only, and an empty tensor are no evidence."""
    named = [(str(i), parameter(torch.zeros(n))) for i, n in enumerate((3, 3, 0))]
    if rank == 1:
        named[0][1].grad = torch.zeros(3)
    return distclip.total_grad_norm(named).item()


@on_ranks(2)
def test_one_nan_does_not_look_like_another_tensor(rank: int) -> None:
    """An overflow of one rank alone is the finite check's to report."""
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh1(2), [Shard(0)]))
    sharded.grad = distribute_tensor(torch.ones(4), mesh1(2), [Shard(0)])
    plain = parameter(torch.ones(4), torch.ones(4))
    assert plain.grad is not None
    if rank == 1:
        plain.grad[2] = float("nan")
    with pytest.raises(distclip.NonFiniteError):
        distclip.clip_grad_norm_([sharded, plain], 1.0, error_if_nonfinite=True)


@on_ranks(2)
def test_after_an_error_the_next_call_is_sound(rank: int) -> float:
    named = replicas()
    in_value(named, rank)
    refused(named, "second")
    return distclip.total_grad_norm(replicas()).item()


# --- frozen parameters ---------------------------------------------------------------------------------


@on_ranks(2)
def test_unfrozen_later(rank: int) -> list[float]:
    """Frozen experts are nobody's business; once they train, the plan is made anew on every rank."""
    head = nn.Parameter(distribute_tensor(torch.ones(4), mesh1(2), [Shard(0)]))
    head.grad = distribute_tensor(torch.tensor([1.0, 2.0, 2.0, 4.0]), mesh1(2), [Shard(0)])
    body = nn.Parameter(distribute_tensor(torch.ones(6), mesh1(2), [Shard(0)]), requires_grad=False)
    clipper = distclip.Clipper([head, body], distclip.GlobalNorm(1e4))
    norms = [clipper.clip().total_norm, distclip.total_grad_norm([head, body])]
    body.requires_grad_(True)
    body.grad = distribute_tensor(torch.full((6,), 2.0), mesh1(2), [Shard(0)])
    norms += [clipper.clip().total_norm, distclip.total_grad_norm([head, body])]
    assert [n.item() for n in norms] == [5.0, 5.0, 7.0, 7.0]
    return [n.item() for n in norms]


@on_ranks(2)
def test_frozen_parameters_may_differ(rank: int) -> None:
    named = replicas()
    in_value(named, rank)
    named[1][1].requires_grad_(False).grad = None
    distclip.total_grad_norm(named)
    named[1][1].requires_grad_(True)
    refused(named, "second")


# --- which ranks take part -----------------------------------------------------------------------------


def halves() -> tuple[DeviceMesh, DeviceMesh]:
    return DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",)), DeviceMesh(
        "cpu", [2, 3], mesh_dim_names=("dp",)
    )


@on_ranks(4)
def test_two_models_never_wait_for_each_other(rank: int) -> None:
    """Ranks 0 and 1 train one model, 2 and 3 another, which clips more often."""
    mine = halves()[rank // 2]
    torch.manual_seed(rank // 2)
    model = nn.Sequential(nn.Linear(4, 3 + rank // 2), nn.LayerNorm(3 + rank // 2))
    fully_shard(model[0], mesh=mine)  # the norm stays plain
    for _ in range(2 + 3 * (rank // 2)):
        model(torch.ones(2, 4)).pow(3).sum().backward()
        want = oracle.norm(oracle.dense_gradients(model.parameters()))
        assert distclip.clip_grad_norm_(model.parameters(), 0.5).item() == pytest.approx(want, rel=1e-6)
        distclip.Clipper(model, distclip.PerParameter(0.1)).clip()


@on_ranks(4)
def test_process_group_restricts_the_scope(rank: int) -> None:
    """Plain replicas of two models: everybody's business, until told whose."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    named = [("w", parameter(torch.full((3,), 1.0 + rank // 2), torch.full((4,), 1.0 + rank // 2)[:3]))]
    refused(named, "w")
    want = (1 + rank // 2) * 3**0.5
    for _ in range(1 + rank // 2):
        total = distclip.total_grad_norm(named, process_group=groups[rank // 2])
        assert total.item() == pytest.approx(want, rel=1e-6)
    in_value(named * 2, rank)
    with pytest.raises(distclip.OwnershipError, match="2 ranks"):
        distclip.Clipper(named, distclip.GlobalNorm(1.0), process_group=groups[rank // 2]).clip()


@on_ranks(4)
def test_a_group_of_ranks_that_are_in_unlike_numbers_of_groups(rank: int) -> None:
    """torch names a group by how many this rank is in, and those wait for each other that name it alike."""
    dist.new_group([0])
    if rank < 3:
        for _ in range(2):  # the second after the first was destroyed
            group = scope._group_of((0, 1, 2))
            assert scope._group_of((0, 1, 2)) is group
            count = torch.ones(1)
            dist.all_reduce(count, group=group)
            assert count.item() == 3
            dist.barrier(group)
            dist.destroy_process_group(group)


@on_ranks(2)
def test_the_message_travels_where_all_ranks_send_it(rank: int) -> None:
    """A group may reduce on the CPU by one backend and on GPUs by another: ranks must choose the same."""
    both, one = dist.new_group(backend="cpu:gloo,cuda:gloo"), dist.new_group(backend="cpu:gloo")
    with FakeTensorMode():
        on_cpu, on_gpu = torch.empty(1), torch.empty(1, device="cuda:0")
    for mine, accelerated, kind in (
        ([], False, "cpu"),
        ([on_cpu], False, "cpu"),
        ([], True, "cuda"),
        ([on_cpu], True, "cuda"),
        ([on_gpu], True, "cuda"),
        ([on_cpu, on_gpu], True, "cuda"),
    ):
        assert scope.message_device(both, mine, accelerated=accelerated).type == kind
        assert scope.message_device(one, mine, accelerated=accelerated).type == "cpu"
        assert scope.first_message_device(both, mine).type == "cpu"
    with FakeTensorMode():
        on_second = torch.empty(1, device="cuda:1")
    gpus = dist.new_group(backend="cuda:gloo")
    assert scope.first_message_device(gpus, [on_cpu, on_second]) == torch.device("cuda:1")
    assert scope.first_message_device(gpus, [on_cpu]).type == "cuda"


@on_ranks(4)
def test_process_group_must_contain_the_mesh(rank: int) -> None:
    group = dist.new_group([0, 1])
    w = nn.Parameter(distribute_tensor(torch.ones(8), mesh1(4), [Shard(0)]))
    if rank < 2:
        with pytest.raises(ValueError, match=r"outside it"):
            distclip.total_grad_norm([w], process_group=group)


@on_ranks(2)
def test_process_group_of_the_wrong_kind(rank: int) -> None:
    named = replicas()
    with pytest.raises(TypeError, match="process_group"):
        distclip.total_grad_norm(named, process_group="dp")  # type: ignore[arg-type]
    square = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"process_group.*2 axes"):
        distclip.total_grad_norm(named, process_group=square)


@on_ranks(2)
def test_a_rank_with_nothing(rank: int) -> None:
    """It says so to the others, instead of leaving them to wait."""
    refused(replicas() if rank == 0 else [], "0 on some, 3 on others")


@on_ranks(2)
def test_nothing_anywhere(rank: int) -> float:
    for norm_type in (2.0, math.inf):
        clipper = distclip.Clipper([], distclip.GlobalNorm(1.0, norm_type), process_group=dist.group.WORLD)
        report = clipper.clip(param_norms=True)
        assert report.total_norm.item() == 0
        assert report.param_norms == {}
    return distclip.clip_grad_norm_([], 1.0).item()


# --- the plans that the functional API remembers -------------------------------------------------------


@on_ranks(2)
def test_the_same_list_is_planned_once(rank: int) -> None:
    """Replicas take collectives to recognise, and none to clip."""
    model = DistributedDataParallel(nn.Linear(4, 3))
    model(torch.ones(2, 4)).pow(2).sum().backward()
    with CommDebugMode() as comm:
        distclip.total_grad_norm(model)
    assert comm.get_total_counts() > 0
    with CommDebugMode() as comm:
        for source in (model, list(model.parameters()), model.parameters(), model.named_parameters()):
            distclip.clip_grad_norm_(source, 1.0)
    assert comm.get_total_counts() == 2  # the gradients are compared again at calls 2 and 4
    with CommDebugMode() as comm:
        distclip.total_grad_norm(list(model.parameters())[:1])  # another list
    assert comm.get_total_counts() > 0


@on_ranks(2)
def test_a_dead_model_is_forgotten(rank: int) -> None:
    gc.collect()

    def remembered() -> int:
        return sum(entry.parameters is not None for entry in known._order.values())

    before = remembered()
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=mesh1(2))
    model(torch.ones(2, 4)).sum().backward()
    distclip.clip_grad_norm_(model.parameters(), 1.0)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    clipper.clip()
    assert remembered() == before + 1
    alive = [weakref.ref(model), weakref.ref(model.weight)]
    del model, clipper
    assert let_go(*alive)
    assert remembered() == before


@on_ranks(2)
def test_parameters_that_take_a_dead_ones_place_are_planned_anew(rank: int) -> list[float]:
    """A list is known by the identity of its tensors, which the next model may inherit."""
    norms = []
    for width in range(2, 12):
        w = nn.Parameter(torch.ones(width))
        if width % 2:
            w = nn.Parameter(distribute_tensor(torch.ones(width), mesh1(2), [Shard(0)]))
        w.grad = torch.ones_like(w)
        norms.append(distclip.total_grad_norm([w]).item())
        assert norms[-1] == pytest.approx(width**0.5, rel=1e-6)
        del w
    return norms


@on_ranks(2)
def test_replicated_dtensors_do_not_reduce(rank: int) -> None:
    w = nn.Parameter(distribute_tensor(torch.ones(3), mesh1(2), [Replicate()]))
    w.grad = DTensor.from_local(torch.ones(3), mesh1(2), [Replicate()], run_check=False)
    distclip.total_grad_norm([w])
    with CommDebugMode() as comm:
        assert distclip.total_grad_norm([w]).item() == pytest.approx(3**0.5)
    assert comm.get_total_counts() == 0
