"""The optimizer in backward: clipped exactly or by the norm of the step before, plain, DDP and FSDP2."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.layout.in_backward import require_gradients_after_backward, uses_optimizer_in_backward
from distclip.layout.parameters import named_parameters
from distclip.training.in_backward import InBackward
from tests import oracle
from tests.counting import count_host_syncs
from tests.harness import let_go, on_ranks
from tests.layouts import LAYOUTS, Net, mesh1
from tests.training.test_hooks import count_collectives, registered

LR = 0.1
KINDS = ("ddp", "ddp_view", "fsdp2", "plain")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def distributed(kind: str) -> nn.Module:
    model: nn.Module = net()
    if kind == "fsdp2":
        for child in model.children():
            fully_shard(child, mesh=mesh1(2))
        return fully_shard(model, mesh=mesh1(2))
    if kind.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp_view", bucket_cap_mb=1e-4)
    return model


def batches(step: int) -> Tensor:
    """[2 ranks, 4 rows, 5]; the second step is a spike."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 4, 5, generator=generator) * (30.0 if step == 1 else 1.0)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).pow(2).sum() * 3.0
    return loss


class Expected:
    """The same steps on one process and the whole batch, with what each strategy should do."""

    def __init__(self, ranks: int) -> None:
        self.model, self.ranks, self.previous = net(), ranks, 0.0

    def step(self, x: Tensor, strategy: Any) -> tuple[float, float]:
        self.model.zero_grad()
        (sum(loss_of(self.model, x[r]) for r in range(self.ranks)) / self.ranks).backward()  # type: ignore[union-attr]
        gradients = oracle.dense_gradients(self.model.parameters())
        p = strategy.norm_type
        total = oracle.norm(gradients, p)
        clipped = []
        for parameter, g in zip(self.model.parameters(), gradients, strict=True):
            assert g is not None
            own = strategy_coefficient(strategy, oracle.norm([g], p), self.previous)
            g = g.clamp(-own, own) if isinstance(strategy, distclip.Value) else g * own
            clipped.append(g)
            parameter.data -= LR * g.float()
        self.previous = total
        return total, oracle.norm(clipped, p)


def strategy_coefficient(strategy: Any, own: float, previous: float) -> float:
    if isinstance(strategy, distclip.Value):
        return float(strategy.clip_value)  # type: ignore[arg-type]
    coefficient = min(1.0, strategy.max_norm / (own + 1e-6))
    if isinstance(strategy, distclip.GlobalNorm):
        coefficient = min(coefficient, strategy.max_norm / (previous + 1e-6))
    return coefficient


STRATEGIES = {
    "value": lambda: distclip.Value(0.5),
    "per_parameter": lambda: distclip.PerParameter(3.0),
    "per_parameter_p3": lambda: distclip.PerParameter(3.0, 3),
    "per_parameter_inf": lambda: distclip.PerParameter(1.0, math.inf),
    "global": lambda: distclip.GlobalNorm(20.0),
}


def run(
    model: nn.Module, rank: int, ranks: int, strategy: distclip.Strategy, collectives: int
) -> list[float]:
    expected = Expected(ranks)
    in_backward = InBackward(model, sgd, strategy)  # type: ignore[arg-type]
    norms, bites = [], []
    for step in range(4):
        x = batches(step)
        loss_of(model, x[rank]).backward()
        with count_collectives() as communication, count_host_syncs() as syncs:
            report = in_backward.end_step()
        assert communication.count == collectives
        assert syncs.count == 0
        assert all(p.grad is None for p in model.parameters())
        total, clipped = expected.step(x, strategy)
        assert report.total_norm.item() == pytest.approx(total, rel=1e-4)
        assert report.clipped_norm.item() == pytest.approx(clipped, rel=1e-4)
        assert report.coefficient.item() == pytest.approx(clipped / total, rel=1e-4)
        assert bool(report.clipped) == (clipped < total * (1 - 1e-7) or isinstance(strategy, distclip.Value))
        assert not report.skipped
        norms += [report.total_norm.item(), report.clipped_norm.item()]
        bites.append(bool(report.clipped))
        for mine, theirs in zip(model.parameters(), expected.model.parameters(), strict=True):
            torch.testing.assert_close(oracle.dense(mine), oracle.dense(theirs), rtol=1e-3, atol=1e-4)
    assert any(bites)
    return norms


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_process(name: str) -> None:
    run(net(), 0, 1, STRATEGIES[name](), 0)


@pytest.mark.parametrize("kind", ["ddp", "ddp_view", "fsdp2"])
@on_ranks(2)
def test_distributed(rank: int, kind: str) -> list[list[float]]:
    collectives = 1 if kind == "fsdp2" else 0
    return [run(distributed(kind), rank, 2, make(), collectives) for make in STRATEGIES.values()]


def test_previous_norm() -> None:
    """n₀ = 5 is not known yet when its gradients arrive, n₁ = 0.5 is clipped by it, n₂ exactly by n₁."""
    weights = nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(1)})
    in_backward = InBackward(weights, sgd, distclip.GlobalNorm(1.0))
    seen = []
    for a, b in ((3.0, 4.0), (0.3, 0.4), (0.3, 0.4)):
        before = weights["a"].item(), weights["b"].item()
        (a * weights["a"] + b * weights["b"]).sum().backward()
        report = in_backward.end_step()
        assert report.total_norm.item() == pytest.approx(math.hypot(a, b))
        seen.append([(was - weights[n].item()) / LR for was, n in zip(before, "ab", strict=True)])
    assert seen[0] == pytest.approx([1.0, 1.0], rel=1e-4)  # each by its own norm
    assert seen[1] == pytest.approx([0.06, 0.08], rel=1e-4)
    assert seen[2] == pytest.approx([0.3, 0.4], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
@on_ranks(2)
def test_nonfinite_gradients_are_not_stepped(rank: int, kind: str, fused: bool) -> list[float]:
    """One infinity on rank 1: one parameter stays as it is, on both ranks, and nothing else."""
    model = distributed(kind)
    outer = model.module.outer if isinstance(model, DistributedDataParallel) else model.outer

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LR, fused=fused)

    in_backward = InBackward(model, adamw, distclip.GlobalNorm(20.0))
    x = batches(0)[0 if kind == "plain" else rank]
    loss_of(model, x).backward()
    first = in_backward.end_step()
    before = {n: oracle.dense(p) for n, p in model.named_parameters()}
    poison = torch.zeros(3)
    poison[2] = math.inf if rank == 1 or kind == "plain" else 0.0

    class Poison(torch.autograd.Function):
        """Adds to one bias a gradient that is infinite in its last element, which rank 1 holds."""

        @staticmethod
        def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return gradient, poison

    handle = outer.register_forward_hook(lambda m, _, y: Poison.apply(y, m.bias), prepend=True)
    loss_of(model, x).backward()
    report = in_backward.end_step()
    handle.remove()
    assert report.nonfinite
    assert report.skipped
    assert torch.isfinite(report.clipped_norm)
    changed = {n for n, p in model.named_parameters() if not torch.equal(oracle.dense(p), before[n])}  # type: ignore[arg-type]
    assert {n.removeprefix("module.") for n in set(before) - changed} == {"outer.bias"}
    assert all(torch.isfinite(oracle.dense(p)).all() for p in model.parameters())  # type: ignore[arg-type]
    bad = {n.removeprefix("module.") for n, v in report.param_norms.items() if not torch.isfinite(v)}
    assert bad == {"outer.bias"}
    assert in_backward.state_dict()["previous_norm"] == first.total_norm  # the last that was finite
    loss_of(model, x).backward()
    return [first.total_norm.item(), in_backward.end_step().total_norm.item()]


@on_ranks(4)
def test_mixed_meshes(rank: int) -> list[float]:
    """Some parameters lie on both axes, others twice on one: each element counts once."""
    case = LAYOUTS["fsdp2_tensor_parallel"].build()
    case.backward(3)
    want = case.dense()
    in_backward = InBackward(case.parameters, sgd, distclip.PerParameter(1e9))
    case.backward(3)
    report = in_backward.end_step()
    assert report.total_norm.item() == pytest.approx(oracle.norm(want.values()), rel=1e-5)
    for name, norm in report.param_norms.items():
        assert norm.item() == pytest.approx(oracle.norm([want[name]]), rel=1e-5)
    return [report.total_norm.item()]


@on_ranks(2)
def test_clipped_after_averaging(rank: int) -> list[float]:
    """Gradients 4 and 0, bound 1: stepped with clip(2) = 1, not with mean(1, 0) = 0.5."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ddp = DistributedDataParallel(model)
    in_backward = InBackward(ddp, sgd, distclip.Value(1.0))
    ddp(torch.tensor([[4.0 if rank == 0 else 0.0]])).sum().backward()
    report = in_backward.end_step()
    assert (report.total_norm.item(), report.clipped_norm.item()) == (2.0, 1.0)
    assert model.weight.item() == pytest.approx(-LR)
    return [model.weight.item()]


def test_second_backward_is_an_error() -> None:
    model = net()
    in_backward = InBackward(model, sgd, distclip.Value(1.0))
    loss_of(model, batches(0)[0]).backward()
    with pytest.raises(ValueError, match="a second backward pass since end_step"):
        loss_of(model, batches(0)[0]).backward()
    in_backward.remove()


@on_ranks(2)
def test_micro_batches_without_synchronisation(rank: int) -> list[float]:
    """DDP: the sum of the micro-batches is averaged, clipped and stepped with, once."""
    model = distributed("ddp")
    in_backward = InBackward(model, sgd, distclip.PerParameter(1e9))
    x = batches(0)
    with model.no_sync():  # type: ignore[operator]
        loss_of(model, x[rank]).backward()
    loss_of(model, x[rank]).backward()
    reference = net()
    sum(loss_of(reference, x[r]) for r in range(2)).backward()  # type: ignore[union-attr]
    want = oracle.norm(oracle.dense_gradients(reference.parameters()))
    total = in_backward.end_step().total_norm.item()
    assert total == pytest.approx(want, rel=1e-4)
    return [total]


@pytest.mark.parametrize("kind", KINDS)
@on_ranks(2)
def test_removal(rank: int, kind: str) -> None:
    model = distributed(kind)
    in_backward = InBackward(model, sgd, distclip.Value(1.0))
    loss_of(model, batches(0)[rank]).backward()
    in_backward.end_step()
    in_backward.remove()
    assert registered(model) == 0
    assert uses_optimizer_in_backward(named_parameters(model)) is None
    before = [oracle.dense(p) for p in model.parameters()]
    loss_of(model, batches(0)[rank]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(oracle.dense(p), b) for p, b in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]
    dead = weakref.ref(next(model.parameters()))
    del model, in_backward
    assert let_go(dead)


def test_schedule_moves_with_the_steps_and_state_survives() -> None:
    def thresholds(step: Tensor) -> Tensor:
        return 1.0 + step

    def made(model: nn.Module) -> InBackward:
        return InBackward(
            model, lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), distclip.PerParameter(thresholds)
        )

    model, twin = net(), net()
    in_backward, other = made(model), made(twin)
    for step in (0, 1):
        loss_of(model, batches(step)[0]).backward()
        assert in_backward.end_step().threshold == 1.0 + step
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(in_backward.state_dict())
    other.load_state_dict(state)
    assert other.state_dict()["previous_norm"] == state["previous_norm"] > 0
    for m, b in ((model, in_backward), (twin, other)):
        loss_of(m, batches(2)[0]).backward()
        assert b.end_step().threshold == 3.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@on_ranks(2)
def test_what_cannot_work_is_refused(rank: int) -> None:
    with pytest.raises(TypeError, match="need the norms of all gradients at once"):
        InBackward(net(), sgd, distclip.ZClip())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="find_unused_parameters"):
        InBackward(DistributedDataParallel(net(), find_unused_parameters=True), sgd, distclip.Value(1.0))
    managed = FSDP1(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="managed by FSDP1"):
        InBackward(managed, sgd, distclip.Value(1.0))
    split = net()
    with torch.no_grad():
        split.inner.weight += rank
    with pytest.raises(distclip.OwnershipError):
        InBackward(split, sgd, distclip.Value(1.0))
    assert registered(split) == 0


def test_detection() -> None:
    """torch's own optimizer in backward leaves nothing to clip: torch returns 0, distclip says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its module calls torch.jit.script
        from torch.distributed.optim import _apply_optimizer_in_backward
    model = net()
    assert uses_optimizer_in_backward(named_parameters(model)) is None
    require_gradients_after_backward(named_parameters(model))
    _apply_optimizer_in_backward(torch.optim.SGD, model.outer.parameters(), {"lr": LR})
    loss_of(model, batches(0)[0]).backward()
    assert torch.nn.utils.clip_grad_norm_(model.outer.parameters(), 1.0) == 0
    assert uses_optimizer_in_backward(named_parameters(model)) == "outer.weight"
    with pytest.raises(ValueError, match=r"outer.weight runs in backward.*distclip.InBackward"):
        require_gradients_after_backward(named_parameters(model))
    with pytest.raises(ValueError, match=r"outer.weight runs in backward"):
        InBackward(model, sgd, distclip.Value(1.0))
    ours = net()
    in_backward = InBackward(ours, sgd, distclip.Value(1.0))
    assert uses_optimizer_in_backward(named_parameters(ours)) == "inner.weight"
    in_backward.remove()
    assert uses_optimizer_in_backward(named_parameters(ours)) is None
