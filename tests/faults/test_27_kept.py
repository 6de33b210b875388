"""27: wherever the first call was made, what is kept from it is right afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from tests import oracle
from tests.harness import on_ranks

SHAPES = ((5, 3), (7,), (2, 600))


def model(factor: float = 1.0) -> nn.ParameterDict:
    m = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(s)) for i, s in enumerate(SHAPES)})
    return give(m, factor)


def give(m: nn.ParameterDict, factor: float) -> nn.ParameterDict:
    for p in m.values():
        p.grad = torch.full_like(p, factor).requires_grad_(False)
    return m


def norm(m: nn.ParameterDict) -> float:
    return oracle.norm(oracle.dense_gradients(m.values()))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad on": torch.enable_grad,
    "device meta": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Passing,
}
STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "GlobalNorm": lambda: distclip.GlobalNorm(1.0),
    "GlobalNorm, Warmup": lambda: distclip.GlobalNorm(distclip.Warmup(0.1, 1.0, 3)),
    "PerParameter": lambda: distclip.PerParameter(0.5),
    "PerGroup": lambda: distclip.PerGroup({"p0": 0.5, "*": 1.0}),
    "Value": lambda: distclip.Value(0.5, measure_direction=True),
    "Percentile": lambda: distclip.Percentile(50, warmup=2),
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "SkipSpikes": lambda: distclip.SkipSpikes(8, min_history=3),
    "AdaGC": lambda: distclip.AdaGC(warmup=2),
    "AGC": lambda: distclip.AGC(0.01),
    "Chain": lambda: distclip.Chain(distclip.ZClip(warmup=2), distclip.AdaGC(warmup=2)),
}


Place = Callable[[], contextlib.AbstractContextManager[object]]


def course(strategy: Callable[[], distclip.Strategy], place: Place, when: str) -> list[float]:
    """Norms and gradients of some steps. ``when``: what is done at that place."""
    said: list[float] = []
    m = model()
    if when == "made":
        with place():
            clipper = distclip.Clipper(m, strategy())
    else:
        clipper = distclip.Clipper(m, strategy())
    for step in range(5):
        give(m, 1.0 + step % 3)
        with (
            place() if (when, step) in (("first", 0), ("made", 0), ("later", 2)) else contextlib.nullcontext()
        ):
            report = clipper.clip(param_norms=step != 1)
        said += [float(report.total_norm), float(report.clipped_norm), norm(m)]
        with place() if when == "saved" and step == 3 else contextlib.nullcontext():
            if step == 3:
                state = copy.deepcopy(clipper.state_dict())
                clipper = distclip.Clipper(m, strategy())
                clipper.load_state_dict(state)
    assert not any(b.is_inference() for b in clipper.strategy.buffers())
    return said


_want: dict[str, list[float]] = {}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_27_a_clipper(name: str, place: str) -> None:
    if name not in _want:
        _want[name] = course(STRATEGIES[name], contextlib.nullcontext, "never")
    for when in ("first", "made", "later", "saved"):
        assert course(STRATEGIES[name], PLACES[place], when) == _want[name], when


def functions() -> None:
    for p in (0.5, 1.0, 2.0, 3.0, float("inf")):
        m = model(2.0)
        want = norm(m) if p == 2 else oracle.norm(oracle.dense_gradients(m.values()), p)
        assert distclip.total_grad_norm(m, p).item() == pytest.approx(want)
        gradients = [q.grad for q in m.values() if q.grad is not None]
        assert distclip.get_total_norm(gradients, p).item() == pytest.approx(want)
        assert distclip.clip_grad_norm_(m, want / 2, p).item() == pytest.approx(want)
        distclip.clip_grads_with_norm_(m, want / 4, want / 2)
        distclip.clip_grad_value_(m, 1e9)
        assert oracle.norm(oracle.dense_gradients(m.values()), p) == pytest.approx(want / 4, rel=1e-4)


@pytest.mark.parametrize("place", [*PLACES, "fake"])
def test_27_functions(place: str) -> None:
    kept = model(2.0)
    if place == "fake":  # memory is estimated so: what there is of the model has no elements
        for _ in range(2):
            with FakeTensorMode():
                fake = model(2.0)
                gradients = [p.grad for p in fake.values() if p.grad is not None]
                norms = [distclip.total_grad_norm(fake), distclip.clip_grad_norm_(fake, 1.0)]
                norms += [distclip.get_total_norm(gradients)]
                distclip.clip_grads_with_norm_(fake, 1.0, norms[0])
                distclip.clip_grad_value_(fake, 1.0)
                assert [(n.shape, n.dtype) for n in norms] == [(torch.Size([]), torch.float32)] * 3
    else:
        with PLACES[place]():
            assert distclip.total_grad_norm(kept).item() == pytest.approx(norm(kept))
            distclip.clip_grad_norm_(kept, 1e9)
            distclip.get_total_norm([p.grad for p in kept.values() if p.grad is not None])
    functions()
    give(kept, 3.0)
    assert distclip.clip_grad_norm_(kept, 1.0).item() == pytest.approx(3.0 * 1222**0.5)
    assert norm(kept) == pytest.approx(1.0, rel=1e-4)


def test_27_a_fake_step() -> None:
    """A whole step, by all that a clipper does, of a model without elements."""
    for name, strategy in STRATEGIES.items():
        if name in ("AdaGC", "Chain"):
            continue  # what it keeps by name has to be read
        with FakeTensorMode():
            m = model()
            clipper = distclip.Clipper(m, strategy())
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            for _ in range(3):
                give(m, 1.0)
                report = (
                    clipper.step(optimizer) if not clipper.strategy.names_parameters() else clipper.clip()
                )
            assert report.total_norm.shape == ()
    functions()


def test_27_first_in_a_trace() -> None:
    m = model(2.0)
    clipper = distclip.Clipper(m, distclip.GlobalNorm(1.0))
    _ = clipper.plan

    @torch.compile(backend="eager")
    def step() -> Tensor:
        return clipper.clip().total_norm

    assert step().item() == pytest.approx(2.0 * 1222**0.5)
    for factor in (1.0, 2.0, 3.0):
        give(m, factor)
        assert clipper.clip().total_norm.item() == pytest.approx(factor * 1222**0.5)
        assert norm(m) == pytest.approx(1.0, rel=1e-4)
    functions()


@pytest.mark.parametrize("way", ["hook", "accumulated", "in backward"])
@pytest.mark.parametrize("place", [p for p in PLACES if p != "autocast"])
def test_27_hooks_and_steps_in_backward_made_there(place: str, way: str) -> None:
    m = nn.ParameterDict({"p": nn.Parameter(torch.ones(4))})
    with PLACES[place]():
        if way == "in backward":
            stepping = distclip.InBackward(m, lambda p: torch.optim.SGD(p, lr=1.0), distclip.GlobalNorm(1.0))
        else:
            distclip.hooks.clip_norm(m, 1.0, when="gradient" if way == "hook" else "accumulated")
    for _ in range(3):
        before = m["p"].detach().clone()
        m["p"].grad = None
        (m["p"] * 3).sum().backward()
        if way == "in backward":
            assert stepping.end_step().total_norm.item() == pytest.approx(6.0)
            stepping.load_state_dict(stepping.state_dict())
            moved = (m["p"].detach() - before).norm()
        else:
            assert m["p"].grad is not None
            moved = m["p"].grad.norm()
        assert moved.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("place", ["inference", "device meta", "default dtype"])
@on_ranks(2)
def test_27_on_ranks(rank: int, place: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    ps = [nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)])) for _ in range(2)]
    grads = [DTensor.from_local(torch.full((3, 2), 2.0), mesh, [Shard(0)]) for _ in range(2)]
    named = [(f"p{i}", p) for i, p in enumerate(ps)]
    clippers = [distclip.Clipper(named, s()) for s in STRATEGIES.values()]
    for step in range(4):
        for clipper in clippers:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.clone()
            with PLACES[place]() if step == 0 else contextlib.nullcontext():
                report = clipper.clip(param_norms=step % 2 == 0)
            if clipper.strategy.norm_type == 2:
                assert report.total_norm.item() == pytest.approx(2 * 24**0.5)
        with PLACES[place]() if step == 0 else contextlib.nullcontext():
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.clone() if step else p.grad
            distclip.clip_grad_norm_(ps, 1.0)
