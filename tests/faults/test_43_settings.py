"""43 and law 13: ranks that are configured differently get one error, on all of them, that quotes both."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import AGC, AdaGC, Chain, GlobalNorm, Percentile, PerGroup, PerParameter, Strategy, Value, ZClip
from distclip.integrations.accelerate import install
from distclip.planning.settings import described
from tests import oracle
from tests.harness import on_ranks
from tests.integrations.accelerators import accelerator
from tests.layouts import mesh1, mesh2

# --- one process: what is told apart, and what is not ---------------------------------------------------


class Own(Strategy):
    def __init__(self, bound: Any, **kwargs: Any) -> None:
        super().__init__()
        self.bound = bound
        for name, value in kwargs.items():
            setattr(self, name, value)

    def forward(self, norms: distclip.Norms) -> distclip.Decision:
        return distclip.Scale(torch.ones_like(norms.total), torch.ones_like(norms.total))


class Ramp:
    def __init__(self, end: float) -> None:
        self.end = end

    def __call__(self, step: Tensor) -> Tensor:
        return torch.clamp(step.float(), max=self.end)

    def method(self, step: Tensor) -> Tensor:
        return self(step)


class RampModule(nn.Module):
    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = end

    def forward(self, step: Tensor) -> Tensor:
        return torch.clamp(step.float(), max=self.end)


def caught(end: float) -> Callable[[Tensor], float]:
    return lambda step: end


def nested(end: float) -> Callable[[Tensor], float]:
    def inner(step: Tensor) -> float:
        return (lambda: end)()

    return inner


def lr_lambda(step: Tensor, end: float = 1.0, *, begin: float = 0.0) -> Tensor:
    return begin + end * step


def with_default(end: float) -> Callable[[Tensor], float]:
    def schedule(step: Tensor, end: float = end) -> float:
        return end

    return schedule


# Made twice alike, and once otherwise.
PAIRS: dict[str, tuple[Callable[[], Strategy], Callable[[], Strategy]]] = {
    "class": (lambda: GlobalNorm(1.0), lambda: Value(1.0)),
    "threshold": (lambda: GlobalNorm(1.0), lambda: GlobalNorm(0.5)),
    "eps": (lambda: GlobalNorm(1.0), lambda: GlobalNorm(1.0, eps=0.0)),
    "norm_type": (lambda: GlobalNorm(1.0), lambda: GlobalNorm(1.0, norm_type=1)),
    "a number and a schedule": (lambda: GlobalNorm(1.0), lambda: GlobalNorm(distclip.Warmup(1.0, 1.0, 5))),
    "schedule": (
        lambda: GlobalNorm(distclip.Warmup(1.0, 2.0, 5)),
        lambda: GlobalNorm(distclip.Warmup(1.0, 2.0, 6)),
    ),
    "lambdas": (lambda: GlobalNorm(lambda step: 1.0), lambda: GlobalNorm(lambda step: 2.0)),
    "names in lambdas": (
        lambda: GlobalNorm(lambda step: step.sin()),
        lambda: GlobalNorm(lambda step: step.cos()),
    ),
    "what a lambda has caught": (lambda: GlobalNorm(caught(1.0)), lambda: GlobalNorm(caught(2.0))),
    "what an inner one has": (lambda: GlobalNorm(nested(1.0)), lambda: GlobalNorm(nested(2.0))),
    "a default": (lambda: GlobalNorm(with_default(1.0)), lambda: GlobalNorm(with_default(2.0))),
    "partial": (
        lambda: GlobalNorm(functools.partial(lr_lambda, end=1.0)),
        lambda: GlobalNorm(functools.partial(lr_lambda, end=2.0)),
    ),
    "an object": (lambda: GlobalNorm(Ramp(1.0)), lambda: GlobalNorm(Ramp(2.0))),
    "a method": (lambda: GlobalNorm(Ramp(1.0).method), lambda: GlobalNorm(Ramp(2.0).method)),
    "a module": (lambda: GlobalNorm(RampModule(1.0)), lambda: GlobalNorm(RampModule(2.0))),
    "order in a chain": (
        lambda: Chain(GlobalNorm(1.0), Value(1.0)),
        lambda: Chain(Value(1.0), GlobalNorm(1.0)),
    ),
    "inside a chain": (
        lambda: Chain(GlobalNorm(1.0), Value(1.0)),
        lambda: Chain(GlobalNorm(1.0), Value(2.0)),
    ),
    "patterns": (lambda: PerGroup({"*": 1.0}), lambda: PerGroup({"*weight": 1.0})),
    "order of patterns": (
        lambda: PerGroup({"*weight": 1.0, "*": 1.0}),
        lambda: PerGroup({"*": 1.0, "*weight": 1.0}),
    ),
    "threshold of a pattern": (lambda: PerGroup({"*": 1.0}), lambda: PerGroup({"*": 2.0})),
    "the last of many": (
        lambda: PerGroup({f"*{i}*": 1.0 for i in range(200)} | {"*": 1.0}),
        lambda: PerGroup({f"*{i}*": 1.0 for i in range(200)} | {"*": 2.0}),
    ),
    "AGC": (lambda: AGC(exclude=("*bias",)), lambda: AGC()),
    "window": (lambda: Percentile(history=100), lambda: Percentile(history=200)),
    "own: a number": (lambda: Own(1.0), lambda: Own(2.0)),
    "own: underscored": (lambda: Own(1, _bound=1.0), lambda: Own(1, _bound=2.0)),
    "own: a list": (lambda: Own([1.0, 2.0]), lambda: Own([1.0, 3.0])),
    "own: a dictionary": (lambda: Own({"a": 1.0}), lambda: Own({"a": 2.0})),
    "own: a tensor": (lambda: Own(torch.tensor([1.0])), lambda: Own(torch.tensor([2.0]))),
    "own: strategies in a list": (lambda: Own([GlobalNorm(1.0)]), lambda: Own([GlobalNorm(2.0)])),
    "own: a set": (lambda: Own({"b", "a", "c"}), lambda: Own({"b", "a", "d"})),
    "own: a NumPy number": (
        lambda: Own(torch.tensor(1.0).numpy()[()]),
        lambda: Own(torch.tensor(2.0).numpy()[()]),
    ),
    "own: a class": (lambda: Own(int), lambda: Own(float)),
    "own: a dtype": (lambda: Own(torch.float32), lambda: Own(torch.float64)),
    "own: None": (lambda: Own(None), lambda: Own(0.0)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_43_told_apart(kind: str) -> None:
    one, other = PAIRS[kind]
    assert described(one()) == described(one())
    assert described(one()) != described(other())
    assert " at 0x" not in described(one())


def test_43_what_is_not_told_apart() -> None:
    """What may well be another on each rank: which rank it is, objects without a meaning here; and nothing
    goes round in circles."""
    assert described(Own(1.0, rank=0)) == described(Own(1.0, rank=1))
    assert described(Own(1.0, logger=object())) == described(Own(1.0, logger=object()))
    circle: Any = Own([])
    circle.bound.append(circle)
    assert len(described(circle)) < 10_000

    def itself(step: Any) -> Any:
        return itself if step else 0

    assert len(described(Own(itself))) < 10_000


# --- between ranks --------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def planted(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def stage() -> tuple[Any, dict[str, Any]]:
    return planted(nn.Linear(4, 4 + dist.get_rank())), {"stages": dist.group.WORLD}


LAYOUTS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "plain": lambda: (planted(mlp()), {}),
    "DDP": lambda: (planted(DDP(mlp())), {}),
    "FSDP2": lambda: (planted(fully_shard(mlp(), mesh=mesh1(2))), {}),  # type: ignore[arg-type]
    "TP": lambda: (
        planted(parallelize_module(mlp(), mesh1(2, "tp"), {"0": ColwiseParallel(), "1": RowwiseParallel()})),
        {},
    ),
    "stages": stage,
}
# As keyword arguments of Clipper, of rank 0 and rank 1, and what is quoted of both.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "class": ({"strategy": GlobalNorm}, {"strategy": PerParameter}, "GlobalNorm", "PerParameter"),
    "threshold": ({}, {"max_norm": 0.5}, "max_norm=1.0", "max_norm=0.5"),
    "on_nonfinite": ({"on_nonfinite": "skip"}, {"on_nonfinite": "raise"}, "='skip'", "='raise'"),
    "accumulate": (
        {"accumulate": torch.float32},
        {"accumulate": torch.float64},
        "torch.float32",
        "torch.float64",
    ),
    "overlap": ({"overlap": False}, {"overlap": True}, "overlap=False", "overlap=True"),
    "norm_type": ({"norm_type": 1}, {"norm_type": 2}, "norm_type=1.0", "norm_type=2.0"),
}


def made(source: Any, strategy: Any = GlobalNorm, max_norm: float = 1.0, **kwargs: Any) -> distclip.Clipper:
    norm_type = kwargs.pop("norm_type", 2.0)
    return distclip.Clipper(source, strategy(max_norm, norm_type=norm_type), **kwargs)


def refused(call: Callable[[], Any], *quoted: str) -> str:
    with pytest.raises(distclip.SettingsError) as error:
        call()
    text = str(error.value)
    assert all(q in text for q in quoted), text
    assert re.search(
        r"on rank\(s\) [\d, ]+, and\n.*\non rank\(s\) [\d, ]+\. Give every rank the same", text
    ), text
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_ranks_differ(rank: int, layout: str) -> list[str]:
    told = []
    for first, second, *quoted in DIFFERENT.values():
        source, kwargs = LAYOUTS[layout]()
        clipper = made(source, **(second if rank else first), **kwargs)
        before = [p.grad.clone() for p in source.parameters()]
        told.append(refused(clipper.clip, *quoted))
        assert all(torch.equal(p.grad, b) for p, b in zip(source.parameters(), before, strict=True))
        told.append(refused(lambda c=clipper: c.plan, *quoted))  # type: ignore[misc]
    return told


@on_ranks(4)
def test_43_hybrid_shards(rank: int) -> str:
    model = planted(fully_shard(mlp(), mesh=mesh2(2, 2, "replicate", "shard")))  # type: ignore[arg-type]
    text = refused_among_four(made(model, max_norm=2.0 if rank == 2 else 1.0))
    assert "max_norm=2.0" in text
    assert "on rank(s) 2" in text
    assert "on rank(s) 0, 1, 3" in text
    return text


def refused_among_four(clipper: distclip.Clipper) -> str:
    with pytest.raises(distclip.SettingsError) as error:
        clipper.clip()
    return str(error.value)


@on_ranks(4)
def test_43_three_kinds(rank: int) -> str:
    text = refused_among_four(made(planted(mlp()), max_norm=[1.0, 1.0, 2.0, 3.0][rank]))
    assert re.search(r"\(rank\(s\) [\d, ]+: something else again\)", text)
    return text


@pytest.mark.parametrize("kind", [k for k in PAIRS if k != "the last of many"])
@on_ranks(2)
def test_43_strategies_differ(rank: int, kind: str) -> str:
    model = planted(fully_shard(mlp(), mesh=mesh1(2)))  # type: ignore[arg-type]
    strategy = PAIRS[kind][rank]()
    with pytest.raises(distclip.SettingsError, match="the strategy is") as error:
        distclip.Clipper(model, strategy).clip()
    return str(error.value)


@on_ranks(2)
def test_43_what_differs_is_shown(rank: int) -> str:
    """However long the rest of it is."""
    text = refused(distclip.Clipper(planted(mlp()), PAIRS["the last of many"][rank]()).clip)
    one, other = (line for line in text.splitlines() if line.startswith("  "))
    assert one != other
    assert len(text) < 1500
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_param_norms(rank: int, layout: str) -> str:
    """Asked for on one rank only, in the first clip."""
    source, kwargs = LAYOUTS[layout]()
    return refused(lambda: made(source, **kwargs).clip(param_norms=rank == 1), "param_norms=True", "=False")


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_scalers(rank: int, layout: str) -> list[str]:
    """On one rank only (one that is off is none), or with another scale; also where the plan stands."""
    said = []
    for planned in (False, True):
        for scaled, scale, quoted in ((rank == 1, 2.0, "no loss scale"), (True, 2.0 + rank, "scale 3")):
            source, kwargs = LAYOUTS[layout]()
            optimizer = torch.optim.SGD(source.parameters(), lr=0.0)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)
            scaler.scale(torch.zeros(()))
            clipper = made(source, **kwargs)
            if planned:
                clipper.clip()  # the next of replicas is compared
            said.append(refused(lambda c=clipper, o=optimizer, s=scaler: c.step(o, s), quoted, "scale 2"))
    return said


@pytest.mark.parametrize("layout", ["FSDP2", "TP", "stages"])
@on_ranks(2)
def test_43_another_scale_in_the_sixth_step(rank: int, layout: str) -> str:
    """Of a scaler on the CPU, where nobody has to wait for it."""
    source, kwargs = LAYOUTS[layout]()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    clipper = made(source, **kwargs)
    for _ in range(5):
        clipper.step(optimizer, scaler)
        for p in source.parameters():
            p.grad = p.grad.clone()
    if rank == 1:
        scaler.update(8.0)
    return refused(lambda: clipper.step(optimizer, scaler), "scale 2", "scale 8")


@pytest.mark.parametrize("other", ["no loss scale", "scale 8"])
@pytest.mark.parametrize("layout", ["FSDP2", "TP", "stages"])
@on_ranks(2)
def test_43_unscaled_with_another_scale_in_the_sixth_step(rank: int, layout: str, other: str) -> str:
    """With torch's order of calls. A rank whose scaler is off has nothing to unscale, and clips."""
    source, kwargs = LAYOUTS[layout]()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    clipper = made(source, **kwargs)

    def step() -> None:
        distclip.unscale_(scaler, optimizer, clipper)
        clipper.clip()
        scaler.step(optimizer)
        scaler.update()
        for p in source.parameters():
            p.grad = p.grad.clone()

    for _ in range(5):
        step()
    if rank == 1 and other == "scale 8":
        scaler.update(8.0)
    elif rank == 1:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
    return refused(step, "scale 2", other)


@pytest.mark.parametrize("p", [2.0, torch.inf])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
@on_ranks(2)
def test_43_a_weight_on_one_rank(rank: int, p: float, calls: int) -> str:
    """In the step after so many: the message of those that have one would be longer."""
    model = fully_shard(mlp(), mesh=mesh1(2))  # type: ignore[arg-type]
    clipper = distclip.Clipper(model, GlobalNorm(1.0, p))

    def step(weight: float | None) -> None:
        with clipper.accumulate(1) as micro:
            micro.backward(model(torch.ones(2, 4)).square().sum(), weight=weight)
        clipper.clip()

    for _ in range(calls):
        step(None)
    return refused(lambda: step(2.0 if rank else None), "weighted=True")


@pytest.mark.parametrize("what", ["param_norms", "policy"])
@on_ranks(4)
def test_43_one_shard_group_of_two(rank: int, what: str) -> str:
    """The message of a step does not reach the other: nobody waits for it, and norms are right."""
    model = planted(fully_shard(mlp(), mesh=mesh2(2, 2, "replicate", "shard")))  # type: ignore[arg-type]
    clipper, optimizer = made(model), torch.optim.SGD(model.parameters(), lr=0.0)
    norms = set()
    for call in range(1, 10):
        odd = rank >= 2 and call > 2
        if what == "policy" and odd:
            clipper.on_nonfinite = "zero"
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        norms.add(float(clipper.step(optimizer, param_norms=what == "param_norms" and odd).total_norm))
    assert len(norms) == 1
    return str(norms)


@on_ranks(4)
def test_43_param_norms_first_where_nothing_was_synchronised(rank: int) -> str:
    """Under HSDP what is asked for later makes no new plan, which would look."""
    model = fully_shard(mlp(), mesh=mesh2(2, 2, "replicate", "shard"))
    clipper = made(model)
    for call in range(3):
        model.set_requires_gradient_sync(call < 2)  # type: ignore[attr-defined]
        model(torch.full((2, 4), 1.0 + rank)).square().sum().backward()
        if call < 2:
            clipper.clip()
            model.zero_grad()
    with pytest.raises(ValueError, match="have not been synchronised") as error:
        clipper.clip(param_norms=True)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("calls", [1, 2, 6])
@on_ranks(2)
def test_43_param_norms_on_one_rank_later(rank: int, layout: str, calls: int) -> str | None:
    """Where a rank then sends more numbers, this was a crash in the backend; where nothing is sent, it is
    right."""
    source, kwargs = LAYOUTS[layout]()
    clipper = made(source, **kwargs)
    for _ in range(calls):
        clipper.clip()
    if layout in ("DDP", "plain"):
        clipper.clip(param_norms=rank == 1)
        return None
    return refused(lambda: clipper.clip(param_norms=rank == 1), "param_norms=True", "=False")


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_param_norms_on_all_later(rank: int, layout: str) -> None:
    source, kwargs = LAYOUTS[layout]()
    clipper = made(source, **kwargs)
    for param_norms in (False, True, False, True, True, False):
        report = clipper.clip(param_norms=param_norms)
    total = distclip.total_grad_norm(source, **kwargs)
    torch.testing.assert_close(report.total_norm, total)


ASKED: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = {
    "max_norm after the norm alone": (
        lambda s, r, **kw: distclip.total_grad_norm(s, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0 + r, **kw),
        ("=1.0", "=2.0"),
    ),
    "max_norm": (
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0 + r, **kw),
        ("=1.0", "=2.0"),
    ),
    "error_if_nonfinite": (
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, error_if_nonfinite=r == 1, **kw),
        ("=True", "=False"),
    ),
    "the norm alone": (
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, **kw) if r else distclip.total_grad_norm(s, **kw),
        ("total_grad_norm", "clip_grad_norm_"),
    ),
    "p": (
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, [2, 1][r], **kw),
        ("norm_type=1.0", "norm_type=2.0"),
    ),
    "p, of a list": (
        lambda s, r, **kw: distclip.total_grad_norm(list(s.parameters()), **kw),
        lambda s, r, **kw: distclip.total_grad_norm(list(s.parameters()), [2, torch.inf][r], **kw),
        ("norm_type=inf", "norm_type=2.0"),
    ),
    "p, both known": (
        lambda s, r, **kw: [distclip.total_grad_norm(s, p, **kw) for p in (1, 2)],
        lambda s, r, **kw: distclip.total_grad_norm(s, [2, 1][r], **kw),
        ("norm_type=1.0", "norm_type=2.0"),
    ),
    "p = ∞ and 2, both known": (
        lambda s, r, **kw: [distclip.total_grad_norm(s, p, **kw) for p in (torch.inf, 2)],
        lambda s, r, **kw: distclip.total_grad_norm(s, [2, torch.inf][r], **kw),
        ("norm_type=inf", "norm_type=2.0"),
    ),
    "p = ∞": (
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0, torch.inf, **kw),
        lambda s, r, **kw: distclip.clip_grad_norm_(s, 1.0 + r, torch.inf, **kw),
        ("=1.0", "=2.0"),
    ),
}


def norm_of(source: nn.Module, p: float, stages: Any = None) -> float:
    own = oracle.norm(oracle.dense_gradients(source.parameters()), p)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, own)
    return float(torch.linalg.vector_norm(torch.tensor(every), p)) if stages is not None else own


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_another_p_on_all_ranks(rank: int, layout: str) -> None:
    """One message more for each p, once."""
    source, kwargs = LAYOUTS[layout]()
    want: dict[float, float] = {}
    messages = 0
    for step in range(8):
        for p in (2, 1, 3, torch.inf):
            with CommDebugMode() as comm:
                norm = distclip.total_grad_norm(source, p, **kwargs)
            assert norm.item() == pytest.approx(want.setdefault(p, norm_of(source, p, **kwargs)), rel=1e-5)
            messages += comm.get_total_counts() if step else 0
    compared = 0 if layout in ("FSDP2", "TP") else 3  # in the 8th, the 16th and the 32nd call
    measured = 0 if layout in ("plain", "DDP") else 7 * 4
    assert messages == measured + compared


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ASKED)
@on_ranks(2)
def test_43_asked_otherwise_after_a_call_that_was_alike(rank: int, layout: str, name: str) -> str:
    source, kwargs = LAYOUTS[layout]()
    before, then, quoted = ASKED[name]
    before(source, rank, **kwargs)
    return refused(lambda: then(source, rank, **kwargs), *quoted)


@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize("other", [{"max_norm": 2.0}, {"norm_type": 1}, {"norm_type": math.inf}])
@on_ranks(2)
def test_43_accelerate_as_called(rank: int, other: dict[str, float], calls: int) -> str:
    """By some ranks otherwise, after so many calls that were alike."""
    model = planted(fully_shard(mlp(), mesh=mesh1(2)))  # type: ignore[arg-type]
    ((what, value),) = other.items()
    with accelerator("fsdp2") as a, install(a):
        a._models.append(model)
        for _ in range(calls):
            a.clip_grad_norm_(model.parameters(), 1.0, 2)
        call = {"max_norm": 1.0, "norm_type": 2.0} | (other if rank else {})
        return refused(lambda: a.clip_grad_norm_(model.parameters(), **call), f"{what}={float(value)}")


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_asked_otherwise_on_all_ranks(rank: int, layout: str) -> None:
    """That is right, and plans nothing anew."""
    source, kwargs = LAYOUTS[layout]()
    for step, raises in enumerate((True, False, True, False)):
        distclip.total_grad_norm(source, **kwargs)
        distclip.clip_grad_norm_(source, 1.0 / (1 + step), error_if_nonfinite=raises, **kwargs)
    torch.testing.assert_close(distclip.total_grad_norm(source, **kwargs).item(), 0.25, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_drop_ins(rank: int, layout: str) -> list[str]:
    source, kwargs = LAYOUTS[layout]()
    tensors = list(source.parameters())
    return [
        refused(lambda: distclip.clip_grad_norm_(source, 1.0, 1 + rank, **kwargs), "=1.0", "=2.0"),
        refused(
            lambda: distclip.clip_grad_norm_(tensors, 1.0 + rank, **kwargs), "max_norm=1.0", "max_norm=2.0"
        ),
        refused(lambda: distclip.total_grad_norm(source, [3, 0.5][rank], **kwargs), "=3.0", "=0.5"),
        refused(
            lambda: distclip.clip_grad_norm_(source, 1.0, 3, error_if_nonfinite=rank == 1, **kwargs),
            "raise",
            "propagate",
        ),
    ]


@on_ranks(2)
def test_43_stages_on_one_rank_only(rank: int) -> str:
    kwargs = {"stages": dist.group.WORLD} if rank else {}
    return refused(made(planted(mlp()), **kwargs).clip, "1 pipeline stage", "2 pipeline stage")


@pytest.mark.parametrize("kind", ["a group", "a mesh"])
@on_ranks(2)
def test_43_stages_of_all_on_one_rank_only(rank: int, kind: str) -> str:
    group: Any = dist.new_group([0, 1]) if kind == "a group" else mesh1(2)  # on both
    kwargs = {"stages": group} if rank else {}
    return refused(made(planted(mlp()), **kwargs).clip, "1 pipeline stage", "2 pipeline stage")


@on_ranks(2)
def test_43_all_ranks_passed_on_one_rank_only(rank: int) -> None:
    """Each would wait in a group of its own. (A mesh of all ranks has the default group.)"""
    mesh = mesh1(2)
    group = dist.new_group([0, 1])
    kwargs: dict[str, Any] = {"process_group": group} if rank else {}
    with pytest.raises(distclip.SettingsError, match="different process groups of the same ranks"):
        made(planted(mlp()), **kwargs).clip()
    kwargs = {"process_group": mesh} if rank else {}
    for _ in range(2):
        report = made(planted(mlp()), **kwargs).clip()
        assert report.total_norm.item() == pytest.approx(40**0.5)


# --- what has been learned ------------------------------------------------------------------------------


def chained() -> Strategy:
    return Chain(ZClip(), Percentile())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [ZClip, AdaGC, chained])
@on_ranks(2)
def test_43_a_checkpoint_on_one_rank_only(rank: int, layout: str, make: Callable[[], Strategy]) -> None:
    source, kwargs = LAYOUTS[layout]()
    first = distclip.Clipper(source, make(), **kwargs)
    first.clip()
    state = first.state_dict()
    second = distclip.Clipper(source, make(), **kwargs)
    if rank:
        second.load_state_dict(state)
    with pytest.raises(distclip.SettingsError, match=r"the state of the strategy .*checkpoint"):
        second.clip()


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_checkpoints_that_differ_after_the_plan(rank: int, layout: str) -> None:
    source, kwargs = LAYOUTS[layout]()
    clipper = distclip.Clipper(source, ZClip(), **kwargs)
    clipper.clip()
    state = copy.deepcopy(clipper.state_dict())
    clipper.clip()
    clipper.load_state_dict(state)  # the same on both: goes on
    clipper.clip()
    clipper.load_state_dict(state if rank else clipper.state_dict())
    with pytest.raises(distclip.SettingsError, match="the state of the strategy"):
        clipper.clip()


# --- what is changed after the plan ---------------------------------------------------------------------


def other_threshold(clipper: Any) -> None:
    clipper.strategy.threshold.value = 0.5


def other_policy(clipper: Any) -> None:
    clipper.on_nonfinite = "raise"


@pytest.mark.parametrize("change", [other_threshold, other_policy])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_changed_on_one_rank_only(rank: int, layout: str, change: Callable[[Any], None]) -> None:
    """Found at a power of two, on both ranks: the settings themselves, or that they are others now."""
    source, kwargs = LAYOUTS[layout]()
    clipper = made(source, **kwargs)
    for _ in range(3):
        planted(source)
        clipper.clip()
    if rank:
        change(clipper)
    said = []
    for _ in range(6):
        planted(source)
        try:
            clipper.clip()
        except (distclip.SettingsError, distclip.OwnershipError) as error:
            said.append(str(error))
            break
    assert said, f"rank {rank} noticed nothing"
    assert re.search(r"differently|have changed", said[0])


@pytest.mark.parametrize("change", [other_threshold, other_policy])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_changed_on_both(rank: int, layout: str, change: Callable[[Any], None]) -> None:
    source, kwargs = LAYOUTS[layout]()
    clipper = made(source, **kwargs)
    for step in range(12):
        if step == 3:
            change(clipper)
        planted(source)
        report = clipper.clip()
        want = 0.5 if step >= 3 and change is other_threshold else 1.0
        assert report.clipped_norm.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_43_found_when_planned_anew(rank: int, layout: str) -> None:
    source, kwargs = LAYOUTS[layout]()
    clipper = made(source, **kwargs)
    clipper.clip()
    next(iter(source.parameters())).requires_grad_(False)
    planted(source)
    clipper.clip()
    clipper.clip()  # 2 after the first plan
    planted(source)
    if rank:
        other_threshold(clipper)
    source.add_module("late", nn.Linear(2, 2)) if isinstance(source, nn.Module) else None
    for p in source.parameters():
        if p.grad is None:
            p.grad = torch.ones_like(p)
    with pytest.raises((distclip.SettingsError, distclip.OwnershipError)):
        clipper.clip()
