"""Strategies that remember: on every placement, step by step, what one process does to whole gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.counting import compares, count_host_syncs
from tests.harness import on_row
from tests.laws.test_placements import _assert_equal_with_nan as assert_equal_with_nan
from tests.laws.test_placements import bits, local, tolerance
from tests.layouts import LAYOUTS, Case

SCALES = (1.0, 1.1, 0.9, math.nan, 1.0, 30.0, 1.2)  # of the gradients of each step
SPIKE = 5


def strategies(n: float) -> dict[str, Callable[[], distclip.Strategy]]:
    """Of gradients whose first norm is ``n``. Warm-ups end before the spike comes."""
    return {
        "Percentile": lambda: distclip.Percentile(50, multiplier=1.5, history=3, warmup=2, initial=0.5 * n),
        "ZClip": lambda: distclip.ZClip(warmup=3, max_norm=2.0 * n),
        "AdaGC": lambda: distclip.AdaGC(warmup=2, max_norm=0.8 * n),
        "SkipSpikes": lambda: distclip.SkipSpikes(4, 3.0, min_history=3),
        "SkipSpikes, loss": lambda: distclip.SkipSpikes(4, 3.0, min_history=3, use_loss=True),
        "GlobalNorm, Warmup": lambda: distclip.GlobalNorm(distclip.Warmup(0.1 * n, 2.0 * n, steps=4)),
        "PerParameter, Cosine": lambda: distclip.PerParameter(distclip.Cosine(0.5 * n, 0.1 * n, steps=4)),
        "Chain, Value first": lambda: distclip.Chain(
            distclip.Value(0.05 * n),
            distclip.SkipSpikes(4, 1e3, min_history=3),
            distclip.ZClip(warmup=3, max_norm=0.2 * n),
        ),
        "Chain": lambda: distclip.Chain(
            distclip.SkipSpikes(4, 1e3, min_history=3),
            distclip.AdaGC(warmup=2, max_norm=0.8 * n),
            distclip.ZClip(warmup=3, max_norm=0.7 * n),
            distclip.Value(0.05 * n),
        ),
    }


def leave_gradients(case: Case, row: str, step: int) -> None:
    """Of every step others; at the NaN step one gradient is NaN, on one rank."""
    case.backward(10 + step)
    if math.isnan(SCALES[step]):
        if LAYOUTS[row].same_everywhere or dist.get_rank() in LAYOUTS[row].replicas_of_rank_1:
            next(g for t in case.tensors if (g := local(t.grad)).numel()).fill_(math.nan)  # type: ignore[arg-type]
    else:
        for tensor in case.tensors:
            if tensor.grad is not None:
                local(tensor.grad).mul_(SCALES[step])


def mean_loss(step: int) -> float:
    return 2.0 + 0.1 * step


def loss_of_rank(step: int) -> Tensor:
    """Another on every rank; the mean over ranks is that of the step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.tensor(mean_loss(step) + rank - (world - 1) / 2)


def numbers(report: distclip.ClipReport) -> list[float]:
    """What has been decided. Slots may come in another order."""
    thresholds = [float(t) for t in report.threshold.flatten().sort().values]
    values = [report.coefficient, report.clipped, report.nonfinite, report.skipped]
    return [*thresholds, *(float(v) for v in values)]


class OneProcess:
    """The same strategy over the whole gradients, as plain tensors of this process alone."""

    def __init__(
        self, strategy: distclip.Strategy, whole: dict[str, Tensor], alone: dist.ProcessGroup | None
    ) -> None:
        self.named = {name: nn.Parameter(torch.zeros_like(g)) for name, g in whole.items()}
        self.clipper = distclip.Clipper(self.named.items(), strategy, process_group=alone)

    def clip(
        self, whole: dict[str, Tensor], loss: Tensor
    ) -> tuple[distclip.ClipReport, dict[str, Tensor | None]]:
        for name, parameter in self.named.items():
            parameter.grad = whole[name].clone()
        return self.clipper.clip(loss=loss), {name: p.grad for name, p in self.named.items()}


@on_row(LAYOUTS)
def test_every_step_equals_one_process(row: str) -> list[str]:
    case = LAYOUTS[row].build()
    case.backward(10)
    first = distclip.total_grad_norm(case.parameters, **case.kwargs).item()
    alone = dist.new_subgroups(1)[0] if dist.is_initialized() else None
    said = []
    for number, (name, make) in enumerate(strategies(first).items()):
        if (number + list(LAYOUTS).index(row)) % 2:  # each strategy on every other row
            continue
        clipper = distclip.Clipper(case.parameters, make(), **case.kwargs)
        assert clipper.plan is not None  # made outside the count
        one: OneProcess | None = None
        touched = []
        for step, scale in enumerate(SCALES):
            leave_gradients(case, row, step)
            whole, before = case.dense(), bits(case)
            if math.isnan(scale):  # one rank has it, and to gather replicas is to ask one of them
                next(g for g in whole.values() if g.numel()).view(-1)[0] = math.nan
            one = one or OneProcess(make(), whole, alone)
            with CommDebugMode() as comm, count_host_syncs() as syncs:
                report = clipper.clip(loss=loss_of_rank(step))
            # AdaGC's too, which sends one number a parameter. A loss has to be averaged, of replicas too.
            least = clipper.strategy.uses_loss and LAYOUTS[row].world > 1
            compared = compares(clipper, step + 1)
            assert comm.get_total_counts() == max(LAYOUTS[row].collectives, least) + compared, name
            assert syncs.count <= 1 or compared, name  # on the CPU one look at whether anything is clipped
            expected, gradients = one.clip(whole, torch.tensor(mean_loss(step)))
            assert numbers(report) == pytest.approx(numbers(expected), rel=1e-5, nan_ok=True), (name, step)
            touched.append(bool(report.clipped | report.skipped))
            said.append(f"{name}: {report}")
            if math.isnan(scale):
                if LAYOUTS[row].collectives < 2:  # else Partial gradients have been summed
                    assert_equal_with_nan(bits(case), before)
                continue
            for key, got in case.dense().items():
                close = tolerance(case.named.get(key, case.tensors[0]))
                torch.testing.assert_close(got, gradients[key], rtol=close, atol=1e-9)
        assert touched[SCALES.index(math.nan)], name  # skipped
        assert touched[SPIKE], name
    return said
