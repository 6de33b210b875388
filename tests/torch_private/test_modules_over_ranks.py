"""What is read of DTensors, DDP, FSDP1 and FSDP2, on real ranks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distclip.torch_private import ddp, dtensor, fsdp, modules
from tests.harness import on_ranks
from tests.layouts import mesh1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def backward(model: Any) -> None:
    model(torch.ones(2, 3)).square().sum().backward()


# --- DTensor ---------------------------------------------------------------------------------------------


@on_ranks(2)
def test_local_tensor_and_local_of(rank: int) -> None:
    whole = torch.arange(6.0).view(3, 2)
    t = distribute_tensor(whole, mesh1(2), [Shard(0)])
    piece = whole[:2] if rank == 0 else whole[2:]
    assert type(dtensor.local_tensor(t)) is Tensor
    assert torch.equal(dtensor.local_tensor(t), piece)
    assert dtensor.local_of(t) is dtensor.local_tensor(t) is next(map(dtensor.local_tensor, [t]))
    assert dtensor.local_of(whole) is whole


@on_ranks(2)
def test_spec(rank: int) -> None:
    t = DTensor.from_local(torch.ones(2, 2), mesh1(2), [Shard(0)], run_check=False)
    assert dtensor.spec(t) is dtensor.spec(t)
    assert dtensor.spec(t).mesh == mesh1(2)
    assert tuple(dtensor.spec(t).placements) == (Shard(0),)


@on_ranks(2)
def test_offsets(rank: int) -> None:
    t = distribute_tensor(torch.zeros(3, 2), mesh1(2), [Shard(0)])
    assert tuple(dtensor.offsets(t)) == (2 * rank, 0)


@on_ranks(2)
def test_dtensors_are_traced(rank: int) -> None:
    def read(t: DTensor) -> Tensor:
        mine: Tensor = getattr(t, dtensor.LOCAL_TENSOR)
        return mine * len(getattr(t, dtensor.SPEC).placements) + dtensor.local_of(t) * 2

    t = DTensor.from_local(torch.ones(2, 2), mesh1(2), [Shard(0)], run_check=False)
    traced: Any = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert traced(t).tolist() == [[3.0] * 2] * 2


# --- DDP -------------------------------------------------------------------------------------------------


@on_ranks(2)
def test_averaged_parameters(rank: int) -> None:
    model = DistributedDataParallel(net())
    assert list(map(id, ddp.averaged_parameters(model))) == list(map(id, model.parameters()))
    assert modules.children_of(model)["module"] is model.module
    assert isinstance(model, modules.wrapper_classes("module", sys.modules))


@on_ranks(2)
def test_comm_hooks(rank: int) -> None:
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        raise AssertionError("it is never called")

    model = DistributedDataParallel(net())
    assert ddp.comm_hooks(model) == []
    model.register_comm_hook("state", hook)
    with pytest.raises(RuntimeError):
        model.register_comm_hook("another", hook)
    assert ddp.comm_hooks(model).pop() == (hook, "another")  # it was refused, and noted all the same
    assert ddp.comm_hooks(model) == [(hook, "state")]


@on_ranks(2)
def test_delays_all_reduce(rank: int) -> None:
    inner = net()
    named = [("1.weight", inner[1].weight)]
    kwargs: dict[str, Any] = {
        "delay_all_reduce_named_params": named,
        "param_to_hook_all_reduce": inner[0].weight,
    }
    assert ddp.delays_all_reduce(DistributedDataParallel(inner, **kwargs))
    assert not ddp.delays_all_reduce(DistributedDataParallel(net()))


@on_ranks(2)
def test_lets_ranks_be_absent(rank: int) -> None:
    model = DistributedDataParallel(net())
    assert not ddp.lets_ranks_be_absent(model)
    with Join([model]):
        assert ddp.lets_ranks_be_absent(model)
        backward(model)
    with Join([model], throw_on_early_termination=True):
        assert not ddp.lets_ranks_be_absent(model)
        backward(model)


@on_ranks(2)
def test_synchronises_and_backward_times(rank: int) -> None:
    model = DistributedDataParallel(net())
    with model.no_sync():
        backward(model)
    assert not ddp.synchronises(model)
    assert not any(time > 0 for time in ddp.backward_times(model))
    backward(model)
    assert ddp.synchronises(model)
    first = ddp.backward_times(model)
    assert len(first) == 4
    assert any(time > 0 for time in first)
    with model.no_sync():
        backward(model)
    assert ddp.backward_times(model) == first
    backward(model)
    assert ddp.backward_times(model) != first


# --- FSDP1 -----------------------------------------------------------------------------------------------


def fsdp1(strategy: ShardingStrategy, **kwargs: Any) -> Any:
    return FullyShardedDataParallel(
        net(), device_id=torch.device("cpu"), sharding_strategy=strategy, **kwargs
    )


@pytest.mark.parametrize("keeps", [False, True])
@on_ranks(2)
def test_flat(rank: int, keeps: bool) -> None:
    model = fsdp1(ShardingStrategy.FULL_SHARD, use_orig_params=keeps)
    flat = fsdp.flat_of(model)
    assert flat is not None
    assert (flat.sharded, flat.keeps_originals) == (True, keeps)
    assert flat.shapes == [(5, 3), (5,), (2, 5), (2,)]
    assert flat.whole == (38 if keeps else 32,)  # originals begin at multiples of 16 bytes
    assert fsdp.flat_size(flat.tensor) == torch.Size(flat.whole)
    assert len(flat.originals) == (4 if keeps else 0)
    assert [(name, id(p)) for _, name, p in flat.places()] == [
        (name, id(p)) for name, p in zip(("weight", "bias") * 2, flat.originals, strict=False)
    ]
    whole = torch.cat([p.detach().flatten() for p in net().parameters()])
    ends = [15, 20, 30, 32]
    for i, end in enumerate(ends):
        shard = flat.shard(i)
        if shard is not None:
            start, count, begin = shard
            first = end - [15, 5, 10, 2][i] + begin
            assert torch.equal(flat.tensor[start : start + count], whole[first : first + count])
    held = torch.tensor(sum(shard[1] for shard in map(flat.shard, range(4)) if shard is not None))
    dist.all_reduce(held)
    assert held.item() == 32
    assert isinstance(model, modules.wrapper_classes("_fsdp_wrapped_module", sys.modules))
    assert "_fsdp_wrapped_module" in modules.children_of(model)


@on_ranks(2)
def test_flat_unsharded(rank: int) -> None:
    flat = fsdp.flat_of(fsdp1(ShardingStrategy.NO_SHARD, use_orig_params=False))
    assert flat is not None
    assert not flat.sharded
    whole = torch.cat([p.detach().flatten() for p in net().parameters()])
    assert torch.equal(flat.tensor[flat.begin(2) : flat.begin(2) + 10], whole[20:30])
    assert flat.begin(0) == 0


@on_ranks(2)
def test_flat_of_and_flat_size_of_nothing(rank: int) -> None:
    assert fsdp.flat_of(FullyShardedDataParallel(nn.ReLU(), device_id=torch.device("cpu"))) is None
    assert fsdp.flat_size(torch.zeros(2)) is None


@on_ranks(2)
def test_flat_gradients_and_synchronises(rank: int) -> None:
    model = fsdp1(ShardingStrategy.FULL_SHARD)
    assert fsdp.flat_gradients(model) == [None]
    with model.no_sync():
        assert not fsdp.synchronises(model)
        backward(model)
    assert fsdp.synchronises(model)
    (gradient,) = fsdp.flat_gradients(model)
    assert gradient is not None
    assert gradient.shape == (32,)


@on_ranks(4)
def test_between_nodes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "within"))
    group = fsdp.between_nodes(fsdp1(ShardingStrategy.HYBRID_SHARD, device_mesh=mesh))
    assert group is not None
    assert dist.get_process_group_ranks(group) == [rank % 2, rank % 2 + 2]
    assert fsdp.between_nodes(fsdp1(ShardingStrategy.FULL_SHARD)) is None


# --- FSDP2 -----------------------------------------------------------------------------------------------


@on_ranks(2)
def test_modules_with_state_groups_members_and_parameters(rank: int) -> None:
    model = net()
    fully_shard(model[0], mesh=mesh1(2))
    fully_shard(model, mesh=mesh1(2))
    known = fsdp.modules_with_state()
    assert any(m is model for m in known)
    assert any(m is model[0] for m in known)
    assert not any(m is model[1] for m in known)
    for module, own in ((model, model[1]), (model[0], model[0])):
        members = [m for group in fsdp.groups_of(module) for m in fsdp.members_of(group)]
        assert [id(fsdp.sharded_parameter(m)) for m in members] == list(map(id, own.parameters()))
    bare = nn.ReLU()
    fully_shard(bare, mesh=mesh1(2))
    assert fsdp.groups_of(bare) == []


@on_ranks(2)
def test_unsharded_gradients(rank: int) -> None:
    model: Any = net()
    fully_shard(model, mesh=mesh1(2))
    (group,) = fsdp.groups_of(model)
    members = fsdp.members_of(group)
    assert not any(map(fsdp.holds_unsharded_gradient, members))
    backward(model)
    assert not any(map(fsdp.holds_unsharded_gradient, members))
    model.set_requires_gradient_sync(False)
    backward(model)
    assert all(map(fsdp.holds_unsharded_gradient, members))
    found = [[g for g in fsdp.unsharded_gradients(m) if g is not None] for m in members]
    assert [tuple(g.shape) for (g,) in found] == [(5, 3), (5,), (2, 5), (2,)]


@on_ranks(2)
def test_awaits_finalization(rank: int) -> None:
    """Where torch has it, see also tests/faults/test_57_finalization.py."""
    sharded: Any = net()
    fully_shard(sharded, mesh=mesh1(2))
    parallel: Any = DistributedDataParallel(net())
    for model in (sharded, parallel):
        backward(model)
    assert not fsdp.awaits_finalization(sharded)
    assert not ddp.awaits_finalization(parallel)
    if not hasattr(sharded, "finalize_backward"):  # before 2.15
        return
    sharded.set_manual_backward_finalization(True)
    parallel.require_manual_backward_finalization = True
    for model, awaits in ((sharded, fsdp.awaits_finalization), (parallel, ddp.awaits_finalization)):
        backward(model)
        assert awaits(model)
        model.finalize_backward()
        assert not awaits(model)


@on_ranks(4)
def test_is_partly_reduced(rank: int) -> None:
    model: Any = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "within")))
    (group,) = fsdp.groups_of(model)
    model.set_requires_all_reduce(False)
    assert not fsdp.is_partly_reduced(group)
    backward(model)
    assert fsdp.is_partly_reduced(group)
    model.set_requires_all_reduce(True)
    backward(model)
    assert not fsdp.is_partly_reduced(group)
