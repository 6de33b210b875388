"""What is measured: one model in one placement, clipped by everybody in turn."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import kernels
from distclip.bench.contenders import CONTENDERS, Absent, Clip
from distclip.bench.counting import count, count_cuda_syncs
from distclip.bench.models import Model, build
from distclip.bench.shapes import SHAPES, Shapes
from distclip.bench.timing import alternate, once, slowest
from distclip.clipper import Clipper
from distclip.strategies.global_norm import GlobalNorm
from distclip.torch_private.foreach import foreach_copy_, foreach_mul_

_MANY_DTENSORS = 4000  # so many take torch minutes for the first call


@dataclass(frozen=True)
class Row:
    """One line of the table: all numbers of one contender in one case. Times in seconds."""

    shapes: str
    placement: str
    dtype: str
    case: str  # "unclipped", "clipped", "first", "changing", "step", "exposed"
    contender: str
    seconds: float = math.nan
    ratio: float = math.nan  # torch's time / this one's
    of_floor: float = math.nan  # times a plain read of the same gradients
    passes: float = math.nan  # bytes moved / bytes of the gradients
    collectives: int | None = None
    host_syncs: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """What is asked for."""

    device: torch.device
    dtype: torch.dtype
    rounds: int = 15
    scale: float | None = None
    peers: Sequence[str] = tuple(CONTENDERS)
    cases: Sequence[str] = ("first", "unclipped", "clipped", "changing")
    dtype_name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype_name", str(self.dtype).removeprefix("torch."))

    def shapes(self, name: str) -> Shapes:
        return SHAPES[name]() if self.scale is None else SHAPES[name](self.scale)


def measure(name: str, placement: str, setting: Setting) -> Iterator[Row]:
    """All rows of one model in one placement. Every rank calls this, and gets the same rows."""
    shapes = setting.shapes(name)
    if shapes.num_tensors > _MANY_DTENSORS and placement not in ("plain", "ddp_bucket_view"):
        yield Row(name, placement, setting.dtype_name, "unclipped", "torch", note="left out: takes minutes")
        return
    model = build(placement, shapes, setting.device, setting.dtype)
    gc.collect()
    gc.freeze()  # what has been imported need not be looked through again, in the middle of a call
    yield from _Case(name, placement, setting, model).rows()
    if "exposed" in setting.cases and model.backward is not None:
        yield from _exposed(
            name, placement, setting, model, build(placement, shapes, setting.device, setting.dtype)
        )
    del model
    if dist.is_initialized():
        dist.barrier()
    gc.unfreeze()
    gc.collect()


def _exposed(name: str, placement: str, setting: Setting, model: Model, twin: Model) -> Iterator[Row]:
    """Clipping right after a backward pass, and both together. The twin is measured during it."""
    case = _Case(name, placement, setting, model)
    usual, overlapped = (Clipper(m.source, GlobalNorm(1e30), overlap=m is twin) for m in (model, twin))
    clips: dict[str, Callable[[], object]] = {
        "torch": partial(CONTENDERS["torch"](model), 1e30),
        "distclip": usual.clip,
        "distclip, overlap": overlapped.clip,
    }
    backwards: dict[str, Callable[[], None]] = {
        who: (twin if "overlap" in who else model).backward or (lambda: None) for who in clips
    }
    for who, clip in clips.items():
        clip()
        backwards[who]()
    exposed = alternate(clips, setting.rounds, setting.device, prepare=lambda who: backwards[who]())

    def both(who: str) -> Callable[[], None]:
        def run() -> None:
            backwards[who]()
            clips[who]()

        return run

    yield from case._compared("exposed", exposed)
    whole = alternate({who: both(who) for who in clips}, setting.rounds, setting.device)
    yield from case._compared("backward and clip", whole)


@dataclass(eq=False)
class _Case:
    name: str
    placement: str
    setting: Setting
    model: Model

    def rows(self) -> Iterator[Row]:
        clips: dict[str, Clip] = {}
        for peer in self.setting.peers:
            try:
                clips[peer] = CONTENDERS[peer](self.model)
            except Absent as absent:
                yield self._row("unclipped", peer, note=f"not measured: {absent}")
        if "first" in self.setting.cases:
            yield from self._first(clips)
        for clip in clips.values():
            for max_norm in (1e30, math.inf):
                clip(max_norm)
        floor = self._floor()
        if "unclipped" in self.setting.cases:
            yield from self._warm("unclipped", clips, lambda clip: lambda: clip(1e30), floor)
        if "clipped" in self.setting.cases:
            norm = float(clips["distclip"](math.inf))
            yield from self._warm("clipped", clips, lambda clip: lambda: clip(norm / 2), floor, self._double)
        if "changing" in self.setting.cases:
            yield from self._changing(clips)
        if "step" in self.setting.cases:
            yield from self._step()

    def _first(self, clips: dict[str, Clip]) -> Iterator[Row]:
        """The plan included; of torch, the tables that DTensor makes for as many gradients. What a process
        does once on a GPU, loading and compiling kernels, is done before."""
        if self.setting.device.type == "cuda":
            other = torch.nn.Parameter(torch.zeros(1, device=self.setting.device, dtype=self.setting.dtype))
            other.grad = torch.ones_like(other)
            Clipper([other], GlobalNorm(0.5)).clip()
            torch.nn.utils.clip_grad_norm_([other], 0.5)
        times: dict[str, float] = {
            peer: slowest([once(lambda: clips[peer](1e30), self.setting.device)], self.setting.device)[0]  # noqa: B023
            for peer in ("distclip", "torch")
            if peer in clips
        }
        yield from self._compared("first", times)

    def _warm(
        self,
        case: str,
        clips: dict[str, Clip],
        call: Callable[[Clip], Callable[[], Tensor]],
        floor: float,
        restore: Callable[[], None] = lambda: None,
    ) -> Iterator[Row]:
        calls: dict[str, Callable[[], object]] = {peer: call(clip) for peer, clip in clips.items()}
        counts = {}
        for peer in calls:
            for _ in range(2):  # whatever is made at first need, and what is proven in the first two calls
                calls[peer]()
                restore()
            counts[peer] = count(calls[peer])
            restore()
            if self.setting.device.type == "cuda":
                counts[peer] = replace(counts[peer], host_syncs=count_cuda_syncs(calls[peer]))
                restore()
        times = alternate(calls, self.setting.rounds, self.setting.device, restore)
        size = sum(t.numel() * t.element_size() for t in self.model.locals)
        unseen = {"distclip"} if kernels.goes_to_triton(self.model.locals[0]) else set()  # no operators
        for row in self._compared(case, times):
            counted = counts[row.contender]
            passes = math.nan if row.contender in unseen else counted.bytes_moved / size
            yield Row(
                **{
                    **vars(row),
                    "of_floor": row.seconds / floor,
                    "passes": passes,
                    "collectives": counted.collectives,
                    "host_syncs": counted.host_syncs,
                }
            )

    def _changing(self, clips: dict[str, Clip]) -> Iterator[Row]:
        """One gradient less each time."""
        times: dict[str, list[float]] = {peer: [] for peer in ("distclip", "torch") if peer in clips}
        kept = [p.grad for p in self.model.parameters]
        for parameter in self.model.parameters[:3]:
            parameter.grad = None
            for peer in times:
                times[peer].append(once(lambda: clips[peer](1e30), self.setting.device))  # noqa: B023
        for parameter, gradient in zip(self.model.parameters, kept, strict=True):
            parameter.grad = gradient
        medians = {peer: sorted(slowest(each, self.setting.device))[1] for peer, each in times.items()}
        yield from self._compared("changing", medians)

    def _step(self) -> Iterator[Row]:
        """Unscale, clip, fused AdamW step and scale update: torch's sequence, and ``clipper.step``."""
        parameters = self.model.parameters
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        scaler = torch.amp.GradScaler(self.setting.device.type, init_scale=8.0, growth_interval=10**9)
        scaler.scale(torch.zeros((), device=self.setting.device))
        kept = [g.clone() for g in self.model.locals]

        def refill() -> None:
            foreach_copy_(self.model.locals, kept)

        def in_torch() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()

        clippers = {
            "distclip": Clipper(self.model.source, GlobalNorm(1.0)),
            "distclip, deferred": Clipper(self.model.source, GlobalNorm(1.0), apply="deferred"),
        }
        calls: dict[str, Callable[[], object]] = {"torch": in_torch, "the fused step alone": optimizer.step}
        for name, clipper in clippers.items():
            calls[name] = partial(clipper.step, optimizer, scaler)
        for call in calls.values():
            call()
            refill()
        times = alternate(calls, self.setting.rounds, self.setting.device, refill)
        alone = times.pop("the fused step alone")
        yield from self._compared("step", times)
        yield from self._compared(
            "before the step", {name: max(time - alone, 0.0) for name, time in times.items()}
        )

    def _compared(self, case: str, times: dict[str, float]) -> Iterator[Row]:
        for peer, seconds in times.items():
            ratio = times["torch"] / seconds if "torch" in times and seconds else math.nan
            yield self._row(case, peer, seconds=seconds, ratio=ratio)

    def _row(self, case: str, contender: str, **numbers: Any) -> Row:
        return Row(self.name, self.placement, self.setting.dtype_name, case, contender, **numbers)

    def _floor(self) -> float:
        """A plain read of as many bytes, by the fastest of torch's operators that read."""
        size = sum(t.numel() * t.element_size() for t in self.model.locals)
        flat = torch.ones(max(1, size // 4), device=self.setting.device)
        reads: dict[str, Callable[[], object]] = {
            "sum": flat.sum,
            "amax": flat.amax,
        }
        if flat.numel() < 2**31:  # CUDA's is for no more
            reads["dot"] = lambda: torch.dot(flat, flat)
        for read in reads.values():
            read()
        return min(alternate(reads, self.setting.rounds, self.setting.device).values())

    def _double(self) -> None:
        foreach_mul_(self.model.locals, 2.0)
