"""Every way to clip, on a device that is not the CPU, as a table of steps; and what of a step waits for it.

The device is one in name only (torch's backend for Python, its tensors fake: shapes, dtypes and devices
without values), so this shows no number. It shows where an operator mixes devices, and where the host would
wait: for a value, for a shape that depends on values, or for a copy to or from the device.

    python -m tests.device.steps          # prints a JSON object: what is wrong, by row
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from distclip import hooks
from distclip.apply.change import change, resolve
from distclip.decide.norms import Norms
from distclip.decide.transfer import Transfer
from distclip.inspection import advice
from distclip.measure.gradients import Bucket, Gradients
from distclip.measure.slots import Slots
from distclip.testing._surroundings import waits

DEVICE = "elsewhere"
STEPS = 4  # of which the first two may make plans

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_PACKAGE = str(Path(distclip.__file__).parent)

Step = Callable[[int], object]


class Waiting(TorchDispatchMode):
    """Notes the operators that make the host wait for a device, and the lines of distclip that call them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args):
            self.note(func)
        result = func(*args, **kwargs)
        copied = func in _COPIES and len(devices_of((args, kwargs, result))) > 1
        if copied and not kwargs.get("non_blocking"):
            self.note(func)
        return result

    def note(self, func: Any) -> None:
        lines = [f for f in traceback.extract_stack() if f.filename.startswith(_PACKAGE)]
        where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}: {lines[-1].line}" if lines else "a step"
        self.seen.append(f"{func} in {where}")


def devices_of(tree: object) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


# --- the table -----------------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "GlobalNorm": lambda: distclip.GlobalNorm(0.5),
    "GlobalNorm 1": lambda: distclip.GlobalNorm(0.5, 1.0),
    "GlobalNorm inf": lambda: distclip.GlobalNorm(0.5, float("inf")),
    "GlobalNorm Cosine": lambda: distclip.GlobalNorm(distclip.Cosine(1.0, 0.1, steps=10)),
    "GlobalNorm Warmup": lambda: distclip.GlobalNorm(distclip.Warmup(0.1, 1.0, steps=10)),
    "Value": lambda: distclip.Value(0.01),
    "Value, direction": lambda: distclip.Value(0.01, measure_direction=True),
    "Value Cosine": lambda: distclip.Value(distclip.Cosine(1.0, 0.1, steps=10), measure_direction=True),
    "PerParameter": lambda: distclip.PerParameter(0.1),
    "PerGroup": lambda: distclip.PerGroup({"*bias": 0.1, "*": 0.5}),
    "Percentile": lambda: distclip.Percentile(warmup=2),
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "AdaGC": lambda: distclip.AdaGC(warmup=2),
    "SkipSpikes": lambda: distclip.SkipSpikes(),
    "AGC": lambda: distclip.AGC(0.01),
    "Chain": lambda: distclip.Chain(distclip.PerParameter(0.5), distclip.GlobalNorm(0.5)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS: dict[str, Callable[[], Step]] = {}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = {"device": DEVICE, "dtype": dtype}
    first, last = nn.Linear(6, 30, **made), nn.Linear(30, 7, **made)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.GELU(), nn.LayerNorm(30, **made), last)  # type: ignore[arg-type]


def backward(net: nn.Module) -> Tensor:
    x = torch.randn(8, 6, device=DEVICE, dtype=next(net.parameters()).dtype)
    loss: Tensor = net(x).square().sum()
    loss.backward()
    return loss


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), fused=True)


def clipping(strategy: str, dtype: str, *, param_norms: bool, on_nonfinite: Any, overlap: bool) -> Step:
    net = model(DTYPES[dtype])
    clipper = distclip.Clipper(net, STRATEGIES[strategy](), on_nonfinite=on_nonfinite, overlap=overlap)

    def step(i: int) -> None:
        loss = backward(net)
        clipper.clip(loss=loss if clipper.strategy.uses_loss else None, param_norms=param_norms)

    return step


def stepping(strategy: str, *, scaled: bool, deferred: bool) -> Step:
    net = model()
    optimizer = adamw(net)
    clipper = distclip.Clipper(net, STRATEGIES[strategy](), apply="deferred" if deferred else "inplace")
    scaler = torch.amp.GradScaler(DEVICE) if scaled else None

    def step(i: int) -> None:
        x = torch.randn(8, 6, device=DEVICE)
        loss = net(x).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        clipper.step(optimizer, scaler, loss=loss if clipper.strategy.uses_loss else None)

    return step


def unscaling() -> Step:
    net = model()
    optimizer, scaler = adamw(net), torch.amp.GradScaler(DEVICE)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))

    def step(i: int) -> None:
        scaler.scale(net(torch.randn(8, 6, device=DEVICE)).square().sum()).backward()
        distclip.unscale_(scaler, optimizer, clipper)
        clipper.clip()
        scaler.step(optimizer)
        scaler.update()

    return step


def accumulating(*, scaled: bool) -> Step:
    """Windows that end one micro-batch early."""
    net = model()
    optimizer = adamw(net)
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))
    scaler = torch.amp.GradScaler(DEVICE) if scaled else None

    def step(i: int) -> None:
        for last in (False, True):
            with clipper.accumulate(3, last=last) as micro:
                micro.backward(net(torch.randn(8, 6, device=DEVICE)).square().sum(), scaler)
        clipper.step(optimizer, scaler)
        optimizer.zero_grad()

    return step


def spam() -> Step:
    net = model()
    optimizer = adamw(net)
    clipper = distclip.Clipper(net, distclip.SPAM(optimizer))

    def step(i: int) -> None:
        backward(net)
        clipper.step(optimizer)

    return step


def function(call: Callable[[nn.Module], object]) -> Step:
    net = model()

    def step(i: int) -> None:
        backward(net)
        call(net)

    return step


def hooked(register: Callable[[nn.Module], object]) -> Step:
    net = model()
    register(net)
    return lambda i: backward(net)


def in_backward(strategy: Any) -> Step:
    net = model()
    clipping = distclip.InBackward(net, lambda params: torch.optim.AdamW(params, fused=True), strategy)

    def step(i: int) -> None:
        backward(net)
        clipping.end_step()

    return step


def recording() -> Step:
    """The history of a run: nothing is fetched before its block is full."""
    net = model()
    history = distclip.History(None, to=print, param_norms_every=2)
    clipper = distclip.Clipper(net, distclip.ZClip(warmup=2))

    def step(i: int) -> None:
        loss = backward(net)
        history.record(clipper.clip(param_norms=history.wants_param_norms), loss=loss)
        history._pending.clear()  # it would be fetched in the end

    return step


def changing(strategy: str) -> Step:
    """Another set of gradients each time, as of experts without tokens."""
    net = model()
    parameters = list(net.parameters())
    clipper = distclip.Clipper(net, STRATEGIES[strategy]())

    def step(i: int) -> None:
        backward(net)
        parameters[i].grad = None
        clipper.clip()

    return step


def advised() -> Step:
    """The step at which the advice about the threshold fetches what it has seen, from a slow device."""
    net = model()
    clipper = distclip.Clipper(net, distclip.GlobalNorm(0.5))

    def step(i: int) -> None:
        backward(net)
        with mock.patch.object(advice, "FIRST_LOOK", 3), mock.patch.object(Transfer, "arrived", False):
            clipper.clip()
        assert (clipper._clipping._advice._coming is not None) == (i >= 2)

    return step


def offloaded(devices: list[str]) -> Step:
    """The coefficient is on the device, these gradients are where they are."""
    slots = Slots(("total",), (0,) * len(devices))

    def step(i: int) -> None:
        buckets = [Bucket([torch.ones(3, device=device)], [i]) for i, device in enumerate(devices)]
        norms = Norms.from_power_sums(torch.ones(1, dtype=torch.float64, device=DEVICE), 2.0, slots.labels)
        outcome = resolve(distclip.GlobalNorm(2.0).decide(norms), norms, "skip")
        change(outcome, Gradients([], buckets, []), slots)

    return step


def row(name: str, make: Callable[..., Step], *args: Any, **kwargs: Any) -> None:
    ROWS[name] = lambda: make(*args, **kwargs)


for _s in STRATEGIES:
    for _dtype, _norms in product(DTYPES, (False, True)):
        row(
            f"clip, {_s}, {_dtype}, param_norms={_norms}",
            *(clipping, _s, _dtype), param_norms=_norms, on_nonfinite="propagate", overlap=False,
        )  # fmt: skip
    for _policy in ("skip", "zero"):
        row(
            f"clip, {_s}, {_policy}",
            *(clipping, _s, "float32"), param_norms=False, on_nonfinite=_policy, overlap=False,
        )  # fmt: skip
    for _scaled in (False, True):
        row(f"step, {_s}, scaled={_scaled}", stepping, _s, scaled=_scaled, deferred=False)
for _s in ("GlobalNorm", "Percentile", "ZClip", "SkipSpikes"):
    for _scaled in (False, True):
        row(f"step, {_s}, scaled={_scaled}, deferred", stepping, _s, scaled=_scaled, deferred=True)
for _s in ("GlobalNorm", "GlobalNorm inf", "PerParameter", "AdaGC"):
    row(
        f"clip, {_s}, overlap",
        *(clipping, _s, "float32"), param_norms=False, on_nonfinite="propagate", overlap=True,
    )  # fmt: skip
for _s in ("GlobalNorm", "GlobalNorm inf", "PerParameter", "PerGroup", "AdaGC"):
    row(f"changing, {_s}", changing, _s)
row("unscale_", unscaling)
for _scaled in (False, True):
    row(f"a window that ends early, scaled={_scaled}", accumulating, scaled=_scaled)
row("SPAM", spam)
row("clip_grad_norm_", function, lambda net: distclip.clip_grad_norm_(net.parameters(), 0.5))
row("clip_grad_norm_ of Tensors", function, lambda net: distclip.clip_grad_norm_(net.parameters(), 0.5, 1.0))
row("clip_grad_value_", function, lambda net: distclip.clip_grad_value_(net.parameters(), 0.5))
row("total_grad_norm", function, lambda net: distclip.total_grad_norm(net))
for _when in ("gradient", "accumulated"):
    row(f"hooks.clip_value, {_when}", hooked, lambda net, when=_when: hooks.clip_value(net, 0.5, when=when))
    row(f"hooks.clip_norm, {_when}", hooked, lambda net, when=_when: hooks.clip_norm(net, 0.5, when=when))
for _strategy in (distclip.GlobalNorm(0.5), distclip.PerParameter(0.5), distclip.Value(0.5)):
    row(f"InBackward, {type(_strategy).__name__}", in_backward, _strategy)
row("History", recording)
row("advice", advised)
row("a rank without gradients", offloaded, [])
row("control: gradients on the CPU", offloaded, ["cpu"])
row("control: some on the CPU", offloaded, ["cpu", DEVICE])
row("control: a value is read", function, lambda net: distclip.total_grad_norm(net).isnan().any().item())
row("control: a copy to the device", function, lambda net: torch.tensor([1.0, 2.0], device=DEVICE))
row("control: devices mixed", function, lambda net: net[0].weight.grad.add_(torch.ones(30, 6)))  # type: ignore[operator, union-attr, index]


# --- what is wrong -------------------------------------------------------------------------------------


def problems_of(name: str) -> list[str]:
    """The places where the host waits, and the error that ended it, if one did."""
    found: list[str] = []
    try:
        with FakeTensorMode():
            step = ROWS[name]()
            for i in range(STEPS):
                with Waiting() as waiting:
                    step(i)
                if i >= 2:
                    found += waiting.seen
    except Exception as error:
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(_PACKAGE)]
        where = "".join(f" in {Path(f.filename).name}:{f.lineno}: {f.line}" for f in lines[-1:])
        found.append(f"{type(error).__name__}{where}: {str(error).splitlines()[0][:200]}")
    return sorted(set(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    # As for a GPU that is not there: torch.tensor(…, device=DEVICE) is then made on the CPU, and copied.
    FakeTensorMode.avoid_device_init = True  # type: ignore[method-assign, assignment]
    json.dump({name: problems_of(name) for name in ROWS}, sys.stdout)
