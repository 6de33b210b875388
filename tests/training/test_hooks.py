"""Clipping in backward hooks: what is clipped when, under DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import hooks
from tests import oracle
from tests.harness import let_go, on_ranks
from tests.layouts import LAYOUTS, mesh1, mesh2

WHEN = ("gradient", "accumulated")


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def leave(p: Tensor, gradient: Tensor) -> None:
    """One backward pass with that gradient."""
    (p * gradient.to(p)).sum().backward()


def registered(model: nn.Module) -> int:
    found = 0
    for p in model.parameters():
        found += len(p._backward_hooks or {}) + len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
    return found


class count_collectives(TorchDispatchMode):
    """Also those in backward, through which CommDebugMode cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


# --- one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", WHEN)
def test_by_value(when: Any) -> None:
    p = parameter(0.0, 0.0, 0.0)
    with hooks.clip_value(p, 1.0, when=when):
        leave(p, torch.tensor([3.0, -0.5, -2.0]))
    assert p.grad is not None
    assert p.grad.tolist() == [1.0, -0.5, -1.0]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3, math.inf])
def test_by_norm(when: Any, norm_type: float) -> None:
    p, small = parameter(0.0, 0.0, 0.0), parameter(0.0)
    with hooks.clip_norm([p, small], 1.0, norm_type=norm_type, when=when):
        leave(p, torch.tensor([3.0, 0.5, -2.0]))
        leave(small, torch.tensor([0.25]))
    assert p.grad is not None
    assert small.grad is not None
    assert oracle.norm([p.grad], norm_type) == pytest.approx(1.0, rel=1e-5)
    assert (p.grad / p.grad[0]).tolist() == pytest.approx([1.0, 1 / 6, -2 / 3])
    assert small.grad.item() == 0.25  # bit for bit, and by its own norm


def test_what_is_clipped() -> None:
    """Two backward passes of 0.75: each contribution is below 1, their sum is not."""
    for when, want in (("gradient", 1.5), ("accumulated", 1.0)):
        p = parameter(0.0)
        with hooks.clip_value(p, 1.0, when=when):  # type: ignore[arg-type]
            leave(p, torch.tensor([0.75]))
            leave(p, torch.tensor([0.75]))
        assert p.grad is not None
        assert p.grad.item() == want, when


@pytest.mark.parametrize("when", WHEN)
def test_argument_is_not_changed(when: Any) -> None:
    """The gradient that arrives may belong to someone else."""
    p, gradient = parameter(0.0, 0.0), torch.tensor([3.0, 4.0])
    p.grad = None
    with hooks.clip_norm(p, 1.0, when=when):
        torch.autograd.backward(p, gradient)
    assert p.grad is not None
    assert gradient.tolist() == [3.0, 4.0] or when == "accumulated"  # torch gave it away as .grad
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("when", WHEN)
def test_order_is_that_of_registration(when: Any) -> None:
    p = parameter(0.0)
    seen: dict[str, float] = {}

    def look(name: str) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            value = tensor if when == "gradient" else tensor.grad
            assert value is not None
            seen[name] = value.item()

        return hook

    def register(hook: Callable[[Tensor], None]) -> None:
        (p.register_hook if when == "gradient" else p.register_post_accumulate_grad_hook)(hook)

    register(look("before"))
    with hooks.clip_value(p, 1.0, when=when):
        register(look("after"))
        leave(p, torch.tensor([4.0]))
    assert seen == {"before": 4.0, "after": 1.0}
    leave(p, torch.tensor([4.0]))
    assert seen["after"] == (4.0 if when == "gradient" else 5.0)  # ours is gone, yours stay
    assert registered(nn.ParameterList([p])) == 2


@pytest.mark.parametrize("when", WHEN)
def test_removal_leaves_nothing(when: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    handle = hooks.clip_norm(model, 1.0, when=when)
    assert registered(model) == 4
    handle.remove()
    handle.remove()
    assert registered(model) == 0
    with contextlib.suppress(KeyError), hooks.clip_value(model, 1.0, when=when):
        assert registered(model) == 4
        raise KeyError
    assert registered(model) == 0


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("removed", [True, False])
def test_keeps_no_model_alive(when: Any, removed: bool) -> None:
    model = nn.Linear(3, 4)
    handle = hooks.clip_norm(model, 1.0, when=when)
    model(torch.ones(3)).sum().backward()
    if removed:
        handle.remove()
    dead = weakref.ref(model), weakref.ref(model.weight)
    gc.disable()  # not by the garbage collector either: no cycles
    try:
        del model
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()
    handle.remove()


@pytest.mark.parametrize("when", WHEN)
def test_unusual_gradients(when: Any) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    z = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    half = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.zeros(4))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    with hooks.clip_norm([embedding, z, half, wide, frozen], 1.0, when=when):
        embedding(torch.tensor([1, 1, 3])).sum().backward()  # coalesced: (2, 2) and (1, 1)
        (z * (3 - 4j)).real.sum().backward()
        (half * 5).sum().backward()
        wide.sum().backward()  # an expanded gradient
    assert embedding.weight.grad is not None
    dense = embedding.weight.grad.to_dense()
    assert dense.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert (dense[1] / dense[3]).tolist() == pytest.approx([2.0, 2.0])
    assert abs(z.grad.item()) == pytest.approx(1.0)  # type: ignore[union-attr]
    assert half.grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)  # type: ignore[union-attr]
    assert wide.grad.tolist() == pytest.approx([0.5] * 4)  # type: ignore[union-attr]
    with hooks.clip_value([embedding, z], 0.25, when=when):
        embedding.weight.grad = z.grad = None
        embedding(torch.tensor([1, 1, 3])).sum().backward()
        (z * (3 - 4j)).real.sum().backward()
    assert embedding.weight.grad.to_dense()[1].tolist() == [0.25, 0.25]
    assert z.grad.item() == pytest.approx(0.15 + 0.2j)  # type: ignore[union-attr]


def test_wrong_arguments() -> None:
    p = parameter(0.0)
    with pytest.raises(ValueError, match="clip_value=-1"):
        hooks.clip_value(p, -1)
    with pytest.raises(ValueError, match="norm_type=0"):
        hooks.clip_norm(p, 1.0, norm_type=0)
    with pytest.raises(ValueError, match="when='averaged'"):
        hooks.clip_norm(p, 1.0, when="averaged")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a DistributedDataParallel"):
        hooks.ddp_clip_hook(nn.Linear(2, 2), clip_value=1.0)  # type: ignore[arg-type]
    assert registered(nn.ParameterList([p])) == 0


# --- DDP: before and after averaging -------------------------------------------------------------------


def one_weight(rank: int, **kwargs: Any) -> tuple[DistributedDataParallel, Tensor]:
    """A model whose gradient is 4 on rank 0 and 0 on the others, and its input."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return DistributedDataParallel(model, **kwargs), torch.tensor([[4.0 if rank == 0 else 0.0]])


@pytest.mark.parametrize("view", [False, True])
@on_ranks(2)
def test_before_and_after_averaging(rank: int, view: bool) -> list[float]:
    """Gradients 4 and 0, bound 1: mean(clip(4), clip(0)) = 0.5, but clip(mean(4, 0)) = 1."""
    got = []
    for register in (
        lambda m: hooks.clip_value(m, 1.0, when="gradient"),
        lambda m: hooks.clip_norm(m, 1.0, when="gradient"),
        lambda m: hooks.clip_value(m, 1.0, when="accumulated"),
        lambda m: hooks.clip_norm(m, 1.0, when="accumulated"),
        lambda m: hooks.ddp_clip_hook(m, clip_value=1.0),
        lambda m: hooks.ddp_clip_hook(m, max_norm=1.0),
        lambda m: hooks.ddp_clip_hook(m, max_norm=1.0, norm_type=math.inf),
    ):
        model, x = one_weight(rank, gradient_as_bucket_view=view)
        with register(model):
            model(x).sum().backward()
        (p,) = model.parameters()
        got.append(p.grad.item())  # type: ignore[union-attr]
        model.zero_grad()
        model(x).sum().backward()
        assert p.grad.item() == 2.0  # type: ignore[union-attr]  # removed: the plain average
    assert got == pytest.approx([0.5] * 4 + [1.0] * 3, rel=1e-5)
    return got


@on_ranks(2)
def test_ddp_hook_parameter_by_parameter(rank: int) -> None:
    case = LAYOUTS["ddp"].build()
    case.backward(3)
    want = case.dense()
    bound = sorted(oracle.norm([g]) for g in want.values())[len(want) // 2]
    handle = hooks.ddp_clip_hook(case.parameters, max_norm=bound)
    case.backward(3)
    for name, gradient in case.dense().items():
        expected = want[name] * min(1.0, bound / (oracle.norm([want[name]]) + 1e-6))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    with count_collectives() as communication:
        case.backward(4)
    assert communication.count == 1  # DDP's own
    handle.remove()
    case.backward(3)
    assert all(torch.equal(g, want[name]) for name, g in case.dense().items())


@on_ranks(2)
def test_ddp_hook_cannot_go_but_lets_go(rank: int) -> None:
    model, x = one_weight(rank)
    handle = hooks.ddp_clip_hook(model, clip_value=1.0)
    with pytest.raises(ValueError, match="a hook of distclip already"):
        hooks.ddp_clip_hook(model, clip_value=1.0)
    ((_, state),) = model._comm_hooks
    assert state.action is not None
    handle.remove()
    assert state.action is None
    assert not state.listeners
    assert state.group_name == model.process_group.group_name
    hooks.ddp_clip_hook(model, clip_value=0.25)  # the same hook again, with another bound
    model(x).sum().backward()
    (p,) = model.parameters()
    assert p.grad.item() == 0.25  # type: ignore[union-attr]
    assert len(model._comm_hooks) == 1
    dead = weakref.ref(p)
    del model, p, state, handle
    assert let_go(dead)


@on_ranks(2)
def test_ddp_hook_needs_whole_parameters(rank: int) -> None:
    model, _ = one_weight(rank)
    distclip.declare(model, sharded_over=mesh1(2))
    with pytest.raises(ValueError, match="only a part of its gradient"):
        hooks.ddp_clip_hook(model, max_norm=1.0)
    hooks.ddp_clip_hook(model, clip_value=1.0).remove()
    with pytest.raises(ValueError, match="pass one of them"):
        hooks.ddp_clip_hook(model)


# --- shards --------------------------------------------------------------------------------------------


def clipped_each(want: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    return {name: g * min(1.0, bound / (oracle.norm([g]) + 1e-6)) for name, g in want.items()}


@pytest.mark.parametrize("row", ["fsdp2_nested_uneven_empty", "fsdp2_cpu_offload"])
@on_ranks(2)
def test_fsdp2(rank: int, row: str) -> None:
    """The norm of the whole parameter, from the averaged shards."""
    case = LAYOUTS[row].build()
    case.backward(3)
    want = case.dense()
    bound = sorted(oracle.norm([g]) for g in want.values())[len(want) // 2]
    with count_collectives() as plain:
        case.backward(3)
    with hooks.clip_norm(case.parameters, bound, when="accumulated"), count_collectives() as hooked:
        case.backward(3)
    expected = clipped_each(want, bound)
    for name, gradient in case.dense().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert hooked.count - plain.count == len(want)
    with hooks.clip_value(case.parameters, 0.01, when="accumulated"):
        case.backward(3)
    for name, gradient in case.dense().items():
        torch.testing.assert_close(gradient, want[name].clamp(-0.01, 0.01))


@on_ranks(4)
def test_two_sharded_axes(rank: int) -> None:
    case = LAYOUTS["fsdp2_tensor_parallel"].build()
    case.backward(3)
    want = case.dense()
    bound = sorted(oracle.norm([g]) for g in want.values())[len(want) // 2]
    with hooks.clip_norm(case.parameters, bound, when="accumulated"):
        case.backward(3)
    expected = clipped_each(want, bound)
    for name, gradient in case.dense().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_fsdp_without_hooks_is_an_error(rank: int) -> None:
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=mesh1(2))
    handle = hooks.clip_value(model, 1.0)
    with pytest.raises(ValueError, match='weight: when="gradient" cannot work under FSDP2'):
        model(torch.ones(2, 4)).sum().backward()
    handle.remove()
    assert registered(model) == 0
    managed = FSDP1(nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="managed by FSDP1"):
        hooks.clip_value(managed, 1.0, when="accumulated")


@pytest.mark.parametrize("when", WHEN)
@on_ranks(2)
def test_tensor_parallel(rank: int, when: Any) -> None:
    """Hooks of DTensors that autograd itself brings: sharded, partial, and declared shards."""
    mesh = mesh1(2)
    whole = torch.arange(12.0).view(4, 3)
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    replicated = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    mine = nn.Parameter(torch.ones(2, 3))
    distclip.declare(mine, sharded_over=mesh)
    handle = hooks.clip_norm([sharded, replicated, mine], 1.0, when=when)
    for _ in range(2):  # the guard against FSDP2 does not go off
        sharded.grad = replicated.grad = mine.grad = None
        (sharded * distribute_tensor(whole, mesh, [Shard(0)])).sum().backward()
        (replicated * 1).backward(DTensor.from_local(whole / 2, mesh, [Partial()]))
        leave(mine, whole.chunk(2)[rank])
    wanted = whole.double() / whole.norm()
    assert replicated.grad is not None
    assert replicated.grad.placements == (Replicate(),)
    for gradient in (sharded.grad, replicated.grad):
        torch.testing.assert_close(oracle.dense(gradient), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(oracle.dense(mine.grad), wanted.chunk(2)[rank], rtol=1e-5, atol=1e-6)
    handle.remove()


@on_ranks(2)
def test_incomplete_gradients_are_refused(rank: int) -> None:
    norm = nn.LayerNorm(4)
    distclip.declare(norm, partial_over=mesh1(2))
    with pytest.raises(ValueError, match="weight is declared partial over"):
        hooks.clip_norm(norm, 1.0)


@on_ranks(4)
def test_hybrid_shards_are_counted_once(rank: int) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh2(2, 2, "r", "s"), [Replicate(), Shard(0)]))
    with hooks.clip_norm(p, 1.0):
        (p * 3).sum().backward()
    assert p.grad is not None
    assert oracle.norm([oracle.dense(p.grad)]) == pytest.approx(1.0, rel=1e-5)
    assert dist.get_world_size() == 4
