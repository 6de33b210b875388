"""50: by whatever entrance, what torch is set to changes no bit of norms, gradients or state."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import distclip
from tests.faults.test_50_strategies import SETTINGS as OF_STRATEGIES
from tests.faults.test_50_strategies import same
from tests.faults.ways import clipping
from tests.harness import on_ranks


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """As scripts have it that make the model without its memory, and forget to take it back."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)


Setting = Callable[[], contextlib.AbstractContextManager[object]]
SETTINGS: dict[str, Setting] = {**OF_STRATEGIES, "default device meta": default_device}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
SHAPES = ((6, 5), (7,), (3, 4), (2, 2, 2))
SPARSE = ((6, 2), [1, 4])


class Model(nn.Module):
    """With gradients that are a fixed series: whatever is set to is set later."""

    def __init__(self) -> None:
        super().__init__()
        for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True)):
            values = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
            self.register_parameter(f"p{i}", nn.Parameter(values.view(shape).to(dtype)))
        self.sparse = nn.Parameter(torch.ones(SPARSE[0], dtype=torch.float32, device="cpu"))

    def give(self, step: int, scale: float = 1.0) -> list[Tensor]:
        gradients = []
        for p in self.parameters():
            values = torch.linspace(0.5, 2, p.numel(), dtype=torch.float64, device="cpu") * (
                scale * (1 + step % 3)
            )
            p.grad = values.view(p.shape).to(p.dtype)
            gradients.append(p.grad)
        rows = torch.tensor([SPARSE[1]], device="cpu")
        values = torch.full((2, 2), 1.5 * scale, dtype=torch.float32, device="cpu")
        self.sparse.grad = torch.sparse_coo_tensor(rows, values, SPARSE[0], device="cpu", dtype=torch.float32)
        return gradients[:-1]

    def backward(self, step: int) -> None:
        wanted = self.give(step)
        own = list(self.parameters())[:-1]
        for p in own:
            p.grad = None
        with torch.enable_grad():
            torch.autograd.backward([p * 1 for p in own], wanted)

    @property
    def now(self) -> list[Tensor]:
        found = [p.detach().clone() for p in self.parameters()]
        return found + [p.grad.to_dense().clone() for p in self.parameters() if p.grad is not None]


STEPS = range(6)
Course = Callable[[Model, Setting], list[Tensor]]


def reported(report: distclip.ClipReport) -> list[Tensor]:
    found = [report.total_norm, report.clipped_norm, report.coefficient, report.threshold]
    return [t.clone() for t in [*found, report.clipped, report.nonfinite, report.skipped]]


def by_clipper(strategy: Callable[[], distclip.Strategy], way: str = "clip", **options: object) -> Course:
    def course(model: Model, setting: Setting) -> list[Tensor]:
        said: list[Tensor] = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.sparse], lr=0.1)
        with setting():
            clipper = distclip.Clipper(model, strategy(), **options)  # type: ignore[arg-type]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        with setting():
            for step in STEPS:
                with torch.inference_mode(False), torch.device("cpu"):
                    model.give(step, scaler.get_scale() if way == "scaler" else 1.0)
                    loss = torch.tensor(2.0 + step, dtype=torch.float32, device="cpu")
                    if way == "scaler":
                        scaler.scale(loss)
                given = loss if clipper.strategy.uses_loss else None
                if way == "clip":
                    report = clipper.clip(loss=given, param_norms=step % 2 == 1)
                else:
                    report = clipper.step(optimizer, scaler if way == "scaler" else None, loss=given)
                said += [*reported(report), *model.now]
                if step == 3:  # saved and loaded, in a clipper made anew
                    state = copy.deepcopy(clipper.state_dict())
                    clipper = distclip.Clipper(model, strategy(), **options)  # type: ignore[arg-type]
                    clipper.load_state_dict(state)
            str(clipper.describe())
            assert clipper.find_nonfinite() == {}
        said += [b.clone() for b in clipper.strategy.buffers()]
        return said

    return course


def function(model: Model, setting: Setting) -> list[Tensor]:
    said = []
    for step in STEPS:
        model.give(step)
        with setting():
            said += [
                distclip.total_grad_norm(model).clone(),
                distclip.clip_grad_norm_(model, 1.0, step % 2 + 1.0).clone(),
            ]
        said += model.now
    return said


def given_norms(model: Model, setting: Setting) -> list[Tensor]:
    said = []
    for step in STEPS:
        model.give(step)
        with setting():
            norm = distclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            distclip.clip_grads_with_norm_(model, 1.0, norm if step % 2 else norm.item())
            distclip.clip_grad_value_(model, 0.2)
        said += [norm.clone(), *model.now]
    return said


def accelerated(model: Model, setting: Setting) -> list[Tensor]:
    said = []
    with clipping("accelerate", model) as clip:
        for step in STEPS:
            model.give(step)
            with setting():
                said.append(clip().clone())
                assert clip.accelerator is not None
                clip.accelerator.clip_grad_value_(model.parameters(), 1e-4)
            said += model.now
    return said


def hooked(make: Callable[[Model], distclip.hooks.Handle]) -> Course:
    def course(model: Model, setting: Setting) -> list[Tensor]:
        said = []
        with setting(), make(model):
            for step in STEPS:
                model.backward(step)
                said += model.now
        return said

    return course


def in_backward(strategy: Callable[[], distclip.GlobalNorm]) -> Course:
    def course(model: Model, setting: Setting) -> list[Tensor]:
        said = []
        model.sparse.requires_grad_(False)
        with setting():
            stepping = distclip.InBackward(model, lambda p: torch.optim.SGD(p, lr=0.1), strategy())
            for step in STEPS:
                model.backward(step)
                model.sparse.grad = None
                said += [*reported(stepping.end_step()), *model.now]
                stepping.load_state_dict(copy.deepcopy(stepping.state_dict()))
        return said

    return course


def unscaled(model: Model, setting: Setting) -> list[Tensor]:
    said = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.sparse], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with setting():
        clipper = distclip.Clipper(model, distclip.ZClip())
        for step in STEPS:
            with torch.inference_mode(False), torch.device("cpu"):
                scaler.scale(torch.ones((), dtype=torch.float32, device="cpu"))
                model.give(step, scaler.get_scale())
            distclip.unscale_(scaler, optimizer, clipper)
            said += [*reported(clipper.clip()), *model.now]
            with torch.device("cpu"):
                scaler.step(optimizer)
                scaler.update()
    return said


def accumulated(model: Model, setting: Setting) -> list[Tensor]:
    said = []
    with setting():
        clipper = distclip.Clipper(model, distclip.Percentile(50, warmup=2))
        for step in STEPS:
            for p in model.parameters():
                p.grad = None
            for i in range(2):
                with clipper.accumulate(2) as micro:
                    loss = sum((p.double() * (step + 1 + i)).sum() for p in model.parameters())
                    assert isinstance(loss, Tensor)
                    micro.backward(loss, weight=i + 1.0)
            said += [*reported(clipper.clip()), *model.now]
    return said


def adaptive() -> distclip.Strategy:
    return distclip.Chain(distclip.SkipSpikes(8, min_history=3, use_loss=True), distclip.ZClip(warmup=2))


def warming_up() -> distclip.Strategy:
    return distclip.GlobalNorm(distclip.Warmup(0.1, 1.0, 3))


CLIPPERS: dict[str, Course] = {
    "clip": by_clipper(lambda: distclip.GlobalNorm(1.0)),
    "clip, p = 3": by_clipper(lambda: distclip.GlobalNorm(1.0, 3)),
    "clip, float64": by_clipper(lambda: distclip.GlobalNorm(1.0), accumulate=torch.float64),
    "clip, zero": by_clipper(lambda: distclip.GlobalNorm(1.0), on_nonfinite="zero"),
    "clip, adaptive": by_clipper(adaptive),
    "clip, AGC": by_clipper(lambda: distclip.AGC(0.01)),
    "clip, AdaGC": by_clipper(lambda: distclip.AdaGC(warmup=2)),
    "clip, Value": by_clipper(lambda: distclip.Value(0.7, measure_direction=True)),
    "clip, Value first": by_clipper(lambda: distclip.Chain(distclip.Value(0.7), warming_up())),
    "step": by_clipper(lambda: distclip.PerParameter(0.5), "step"),
    "step, scaler": by_clipper(lambda: distclip.GlobalNorm(1.0), "scaler"),
}  # fmt: skip
FUNCTIONS: dict[str, Course] = {
    "function": function,
    "given norms": given_norms,
    "accelerate": accelerated,
    "unscale_": unscaled,
}
# With a backward pass of their own, which cannot be in inference mode.
IN_BACKWARD: dict[str, Course] = {
    "hook, norm": hooked(lambda m: distclip.hooks.clip_norm(m, 0.5)),
    "hook, norm of .grad": hooked(
        lambda m: distclip.hooks.clip_norm(m, 0.5, norm_type=1, when="accumulated")
    ),
    "hook, value": hooked(lambda m: distclip.hooks.clip_value(m, 0.7)),
    "InBackward": in_backward(lambda: distclip.GlobalNorm(1.0)),
    "InBackward, each": in_backward(lambda: distclip.PerParameter(0.5)),
    "accumulate": accumulated,
}

TABLE = [
    (entrance, setting)
    for courses in (CLIPPERS, FUNCTIONS, IN_BACKWARD)
    for entrance in courses
    for setting in SETTINGS
    if not (courses is IN_BACKWARD and setting in ("inference", "no grad"))
]
COURSES = CLIPPERS | FUNCTIONS | IN_BACKWARD
_expected: dict[str, list[Tensor]] = {}


@pytest.mark.parametrize(("entrance", "setting"), TABLE)
def test_50_equal_to_the_bit(entrance: str, setting: str) -> None:
    if entrance not in _expected:
        _expected[entrance] = COURSES[entrance](Model(), contextlib.nullcontext)
    want = _expected[entrance]
    got = COURSES[entrance](Model(), SETTINGS[setting])
    assert len(got) == len(want) > 40
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert same(g, w), (i, g, w)


@pytest.mark.parametrize(
    "setting", ["bfloat16", "float16", "device meta", "default device meta", "inference"]
)
@on_ranks(2)
def test_50_on_ranks(rank: int, setting: str) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def course(setting: Setting) -> list[Tensor]:
        said: list[Tensor] = []
        values = torch.linspace(0.5, 2, 12, dtype=torch.float32, device="cpu").view(6, 2)
        plain = nn.Parameter(values.clone())
        sharded = nn.Parameter(DTensor.from_local(values * (rank + 1), mesh, [Shard(0)], run_check=False))
        for strategy in (
            distclip.GlobalNorm(1.0),
            distclip.AGC(0.01),
            distclip.Chain(distclip.SkipSpikes(use_loss=True), distclip.AdaGC()),
        ):
            with setting():
                clipper = distclip.Clipper([("plain", plain), ("sharded", sharded)], strategy)
                for step in range(4):
                    with torch.inference_mode(False):
                        plain.grad = values * step
                        sharded.grad = DTensor.from_local(
                            values * (rank + step), mesh, [Shard(0)], run_check=False
                        )
                    loss = values.sum() if strategy.uses_loss else None
                    said += reported(clipper.clip(loss=loss, param_norms=step == 2))
                    said += [plain.grad.clone(), sharded.grad._local_tensor.clone()]  # type: ignore[attr-defined]
                    said.append(distclip.clip_grad_norm_([plain, sharded], 1e-3).clone())
                str(clipper.describe())
                clipper.verify()
        return said

    want = course(contextlib.nullcontext)
    got = course(SETTINGS[setting])
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert same(g, w), (i, g, w)
