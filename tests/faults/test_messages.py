"""What a mistake is answered with: a sentence that has its name, its cause and its remedy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip import Chain, Clipper, GlobalNorm, Percentile, SkipSpikes, ZClip
from tests.harness import on_ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).sum().backward()
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


class NoOptimizer:
    def step(self) -> None: ...


class Wrapper(NoOptimizer):
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def exhausted() -> Any:
    parameters = net().parameters()
    sgd_of = list(parameters)
    assert sgd_of
    return parameters


def step(what: Callable[[nn.Module], Any], scaler: Any = None) -> Callable[[], Any]:
    def call() -> Any:
        model = net()
        return Clipper(model, GlobalNorm(1.0)).step(what(model), scaler)

    return call


def of(parameters: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: Clipper(parameters(), GlobalNorm(1.0)).clip()


def loss(value: Any) -> Callable[[], Any]:
    return lambda: Clipper(net(), SkipSpikes(use_loss=True)).clip(loss=value)


def micro(value: Any, scaler: Any = None) -> Callable[[], Any]:
    def call() -> None:
        with Clipper(net(), GlobalNorm(1.0)).accumulate(2) as micro:
            micro.backward(value, scaler)

    return call


def loads(own: Callable[[], Any], saved: Any) -> Callable[[], Any]:
    def call() -> None:
        clipper = Clipper(net(), own())
        clipper.clip()
        before = copy.deepcopy(clipper.state_dict())
        try:
            clipper.load_state_dict(saved(clipper) if callable(saved) else saved)
        finally:
            assert str(clipper.state_dict()) == str(before), "something has been loaded all the same"

    return call


def state(strategy: distclip.Strategy) -> dict[str, Any]:
    clipper = Clipper(net(), strategy)
    clipper.clip()
    return clipper.state_dict()


def grouped(argument: str, group: Any) -> Callable[[], Any]:
    return lambda: Clipper(net(), GlobalNorm(1.0), **{argument: group})


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # optimizers
    "LBFGS": (
        step(lambda m: torch.optim.LBFGS(m.parameters())),
        ValueError,
        r"LBFGS runs backward several times.*clipper\.clip\(\) at the end of the closure",
    ),
    "no torch optimizer": (
        step(lambda m: NoOptimizer()),
        TypeError,
        r"NoOptimizer is no torch\.optim\.Optimizer.*clipper\.clip\(\) and then its own step",
    ),
    "wraps one": (
        step(lambda m: Wrapper(sgd(m))),
        TypeError,
        r"Wrapper is no torch.*wraps one \(SGD\).*clipper\.step\(wrapper\.optimizer\)",
    ),
    "a scheduler": (
        step(lambda m: torch.optim.lr_scheduler.StepLR(sgd(m), 1)),
        TypeError,
        r"StepLR is no torch",
    ),
    "the model": (step(lambda m: m), TypeError, r"given the module Linear: pass its optimizer"),
    "a class": (step(lambda m: torch.optim.SGD), TypeError, "given the class SGD: pass the optimizer"),
    "None": (step(lambda m: None), TypeError, r"given a NoneType: expected a torch\.optim"),
    "parameters": (step(lambda m: m.parameters()), TypeError, "given a Parameter: expected"),
    "no optimizer": (step(lambda m: []), ValueError, r"step\(\[\]\).*Pass it"),
    "twice": (step(lambda m: [sgd(m)] * 2), ValueError, "same optimizer twice"),
    "scaler first": (
        step(lambda m: GradScaler("cpu")),
        TypeError,
        r"the order is clipper\.step\(optimizer, scaler",
    ),
    "of another model": (
        step(lambda m: sgd(net())),
        ValueError,
        r"param_groups\[0\]\[0\] of SGD.*whole model",
    ),
    # scalers
    "scaler of apex": (
        step(sgd, NoOptimizer()),
        TypeError,
        r"scaler is a NoOptimizer: expected.*clipper\.clip",
    ),
    "scale": (step(sgd, 1024.0), TypeError, r"scaler is a float: expected a torch\.amp\.GradScaler"),
    "scaler class": (step(sgd, GradScaler), TypeError, "scaler is the class GradScaler"),
    "optimizer as scaler": (step(sgd, sgd(net())), TypeError, "scaler is a SGD"),
    "scaler unused": (step(sgd, GradScaler("cpu")), ValueError, r"never scaled a loss: call scaler\.scale"),
    # losses
    "loss elements": (loss(torch.ones(2)), ValueError, r"loss has shape \(2,\).*loss\.mean\(\)"),
    "loss list": (loss([1.0]), TypeError, "loss is a list: expected"),
    "loss word": (loss("1.0 or so"), TypeError, "loss is a str"),
    "loss complex": (loss(torch.tensor(1j)), ValueError, "loss is torch.complex64: expected one real"),
    "loss on meta": (loss(torch.ones((), device="meta")), ValueError, "loss is on the meta device"),
    "no loss": (loss(None), ValueError, r"judges the loss.*clipper\.step\(optimizer, loss=loss\)"),
    "micro elements": (micro(torch.ones(2, requires_grad=True)), ValueError, r"loss of shape \(2,\).*mean"),
    "micro detached": (micro(torch.ones(())), ValueError, "requires no gradient.*no_grad"),
    "micro number": (micro(1.0), TypeError, "given a float: expected the loss"),
    "micro scaler": (micro(torch.ones((), requires_grad=True), 8.0), TypeError, "scaler is a float"),
    # strategies
    "strategy class": (
        lambda: Clipper(net(), GlobalNorm),  # type: ignore[arg-type]
        TypeError,
        r"strategy is the class GlobalNorm itself: make one, distclip\.GlobalNorm\(",
    ),
    "threshold": (lambda: Clipper(net(), 0.5), TypeError, r"distclip\.GlobalNorm\(0\.5\)"),  # type: ignore[arg-type]
    "swapped": (
        lambda: Clipper(GlobalNorm(1.0), net()),  # type: ignore[arg-type]
        TypeError,
        r"parameters is the strategy GlobalNorm: the order is Clipper\(model, strategy\)",
    ),
    "a word": (lambda: Clipper(net(), "zclip"), TypeError, "strategy is a str: expected"),  # type: ignore[arg-type]
    **{
        f"max_norm={value!r}": (
            lambda value=value: GlobalNorm(value),  # type: ignore[misc]
            ValueError,
            "max_norm=.*expected a number that is not negative",
        )
        for value in ("much", None, -1.0, math.nan, torch.ones(2), torch.tensor(-1.0), [1.0], 1j)
    },
    "norm_type": (
        lambda: GlobalNorm(1.0, norm_type=4),
        ValueError,
        r"norm_type=4: expected one of 0\.5, 1, 2",
    ),
    # parameters
    "gradients": (
        of(lambda: [p.grad for p in net().parameters()]),
        ValueError,
        r"parameters\[0\] \(shape \(4, 4\)\).*a gradient seems to have been passed.*reads their \.grad",
    ),
    "exhausted": (of(exhausted), ValueError, r"an iterator that yields nothing.*Pass the module itself"),
    "state_dict": (of(lambda: net().state_dict()), TypeError, r"is a OrderedDict.*Pass the module itself"),
    "its values": (of(lambda: net().state_dict().values()), ValueError, r"a state_dict\(\) holds detached"),
    "a list of them": (of(lambda: list(net().state_dict().values())), ValueError, "requires no gradient"),
    "a dict": (of(lambda: dict(net().named_parameters())), TypeError, r"is a dict.*keys, not its values"),
    "module class": (of(lambda: nn.Linear), TypeError, "the class Linear itself: pass the object"),
    "method": (
        of(lambda: net().parameters),
        TypeError,
        r"the method parameters itself: call it, parameters\(\)",
    ),
    "param_groups": (of(lambda: sgd(net()).param_groups), TypeError, "pass the optimizer itself"),
    "optimizers": (of(lambda: [sgd(net())]), TypeError, r"the optimizer SGD: several cannot.*one list"),
    "nested": (of(lambda: [list(net().parameters())]), TypeError, r"parameters\[0\] is a list"),
    "one pair": (of(lambda: ("w", nn.Parameter(torch.ones(1)))), TypeError, r"\[\(name, tensor\)\]"),
    "number": (of(lambda: 3), TypeError, "parameters=int: expected a Module"),
    "computed": (of(lambda: [net().weight * 2]), ValueError, r"not a leaf tensor.*retain_grad"),
    "meta": (of(lambda: nn.Linear(4, 4, device="meta")), ValueError, r"weight \(shape \(4, 4\)\).*to_empty"),
    "lazy": (of(lambda: nn.LazyLinear(4)), ValueError, "weight has no shape yet: run one forward pass"),
    # groups, without a process group at all
    **{
        f"{argument}={group!r}": (
            grouped(argument, group),
            TypeError,
            rf"{argument}=.*expected a ProcessGroup or a 1-D DeviceMesh.*dist\.new_group\(\[0, 1\]\)",
        )
        for argument in ("process_group", "stages")
        for group in ([0, 1], (0, 1), range(2))
    },
    "group=3": (grouped("process_group", 3), TypeError, "process_group=3: expected"),
    "stages=dp": (grouped("stages", "dp"), TypeError, "stages='dp': expected"),
    "not in it": (
        grouped("stages", dist.GroupMember.NON_GROUP_MEMBER),
        TypeError,
        r"a rank that is not in the group",
    ),
    # options
    "on_nonfinite": (
        lambda: Clipper(net(), GlobalNorm(1.0), on_nonfinite="ignore"),  # type: ignore[arg-type]
        ValueError,
        "on_nonfinite='ignore': expected one of 'skip'",
    ),
    "accumulate": (
        lambda: Clipper(net(), GlobalNorm(1.0), accumulate=4),  # type: ignore[arg-type]
        ValueError,
        r"accumulate=4: expected torch\.float32",
    ),
    # states
    "{}": (loads(ZClip, {}), ValueError, r"state holds nothing.*clipper\.state_dict\(\)"),
    "{} without state": (loads(lambda: GlobalNorm(1.0), {}), ValueError, "state holds nothing"),
    "of the model": (
        loads(ZClip, net().state_dict()),
        ValueError,
        r"holds 'weight', 'bias' and no 'strategy'",
    ),
    "of the optimizer": (loads(ZClip, sgd(net()).state_dict()), ValueError, "that of the model or the optim"),
    "of another": (
        loads(lambda: GlobalNorm(1.0), state(ZClip())),
        ValueError,
        r"saved by ZClip\(.*this is GlobalNorm\(max_norm=1\.0.*make the Clipper with the strategy",
    ),
    "of a Chain": (
        loads(ZClip, state(Chain(ZClip(), GlobalNorm(1.0)))),
        ValueError,
        r"saved by Chain\(ZClip.*this is ZClip",
    ),
    "of other settings": (
        loads(lambda: Percentile(history=200), state(Percentile(history=500))),
        ValueError,
        r"history=500, this one has history=200: make it with history=500",
    ),
    "steps below 0": (
        loads(ZClip, lambda c: {**c.state_dict(), "steps": -1}),
        ValueError,
        r"has been changed since \(steps=-1",
    ),
    "micro-batches below 0": (
        loads(ZClip, lambda c: {**c.state_dict(), "micro_batches": -4}),
        ValueError,
        "has been changed since .*micro_batches=-4",
    ),
    "a path": (loads(ZClip, "clipper.pt"), TypeError, r"state is a str: expected what clipper\.state_dict"),
    "None as state": (loads(ZClip, None), TypeError, "state is a NoneType"),
    "steps": (loads(ZClip, lambda c: {**c.state_dict(), "steps": "many"}), ValueError, "has been changed"),
    "window": (
        loads(ZClip, lambda c: {**c.state_dict(), "micro_batches": None}),
        ValueError,
        "changed since",
    ),
    "saved_by": (loads(ZClip, lambda c: {**c.state_dict(), "saved_by": "me"}), ValueError, "changed since"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str) -> None:
    call, error, says = MISTAKES[mistake]
    with pytest.raises(error, match=says) as caught:
        call()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 500  # no dump of a model


@pytest.mark.parametrize(
    ("value", "skips"), [(1.5, False), (3, False), (torch.tensor([2]), False), (math.nan, True)], ids=str
)
def test_a_loss_may_be_a_number(value: Any, skips: bool) -> None:
    assert bool(Clipper(net(), SkipSpikes(use_loss=True)).clip(loss=value).skipped) is skips
    assert not Clipper(net(), GlobalNorm(1.0)).clip(loss=value).skipped


SILENT: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, "no parameter that trains"),
    "frozen": (lambda: nn.Linear(4, 4).requires_grad_(False), "no parameter that trains"),
    "no parameters": (nn.ReLU, "no parameter that trains"),
    "no backward pass": (lambda: nn.Linear(4, 4), "no parameter has a gradient at the first clip"),
    "filtered": (
        lambda: [p for p in nn.Linear(4, 4).parameters() if p.grad is not None],
        "filtered by `p.grad is not None`",
    ),
}


@pytest.mark.parametrize("mistake", SILENT)
def test_nothing_to_clip_is_said_once(mistake: str, caplog: pytest.LogCaptureFixture) -> None:
    parameters, says = SILENT[mistake]
    clipper = Clipper(parameters(), GlobalNorm(1.0))
    for _ in range(12):
        clipper.clip()
    assert [says in record.getMessage() for record in caplog.records] == [True]


FINE: dict[str, Callable[[], Any]] = {
    "DataParallel": lambda: nn.DataParallel(net()),
    "eval": lambda: net().eval(),
    "set": lambda: set(net().parameters()),
    "values": lambda: dict(net().named_parameters()).values(),
    "generator": lambda: (pair for pair in net().named_parameters()),
    "ParameterList": lambda: nn.ParameterList(net().parameters()),
    "scripted": lambda: _scripted(),
    "scripted, in a list": lambda: [_scripted()],
    "compiled": lambda: _backward(torch.compile(nn.Linear(4, 4), backend="eager")),
}


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        return _backward(torch.jit.script(nn.Linear(4, 4)))


def _backward(model: Any) -> Any:
    model(torch.ones(2, 4)).sum().backward()
    return model


@pytest.mark.parametrize("kind", FINE)
def test_what_is_no_mistake(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source = FINE[kind]()
    clipper = Clipper(source, GlobalNorm(1e-3))
    for _ in range(2):
        assert clipper.clip().clipped_norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert not [record for record in caplog.records if record.name == "distclip"]


REPRS: dict[str, Callable[[nn.Module], Clipper]] = {
    "Clipper(GlobalNorm(max_norm=1.0, norm_type=2.0), ": lambda m: Clipper(m, GlobalNorm(1.0)),
    "Clipper(Chain(SkipSpikes(sigma=6.0, min_history=64), GlobalNorm(max_norm=1.0, norm_type=2.0)), "
    "on_nonfinite='zero', overlap=True, ": lambda m: Clipper(
        m, Chain(SkipSpikes(), GlobalNorm(1.0)), overlap=True, on_nonfinite="zero"
    ),
}


@pytest.mark.parametrize("told", REPRS)
def test_repr(told: str) -> None:
    model = net()
    clipper = REPRS[told](model)
    assert repr(clipper) == told + "not planned yet, 0 steps)"
    clipper.step(sgd(model))
    assert repr(clipper) == told + "2 parameters, 1 steps)"


# --- several ranks ---------------------------------------------------------------------------------------


def _raises(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@on_ranks(2)
def test_flat_parameters_of_fsdp1(rank: int) -> str:
    """Only that: nothing of experts and stages."""
    model = FSDP1(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
    model(torch.ones(2, 4)).sum().backward()
    said = _raises(Exception, lambda: Clipper(list(model.parameters()), GlobalNorm(1.0)).clip())
    assert "is a flat parameter of FSDP1" in said
    assert "pass the FullyShardedDataParallel module itself" in said
    assert "stages=" not in said
    assert _raises(Exception, lambda: distclip.clip_grad_norm_(model.parameters(), 1.0)) == said
    return said


@on_ranks(2)
def test_ddp_takes_one_hook(rank: int) -> str:
    model = DDP(nn.Linear(4, 4))
    clipper = Clipper(model, GlobalNorm(1.0), overlap=True)
    _backward(model)
    clipper.clip()
    other = DDP(nn.Linear(4, 4))
    other.register_comm_hook(None, _their_hook)
    said = _raises(ValueError, lambda: distclip.hooks.ddp_clip_hook(other, max_norm=1.0))
    assert "DistributedDataParallel(Linear) has a communication hook already, _their_hook" in said
    assert "distclip.Clipper(model, strategy)" in said
    return said


# Without annotations, which DDP compares with classes.
def _their_hook(state, bucket):  # type: ignore[no-untyped-def]
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("argument", ["process_group", "stages"])
@on_ranks(2)
def test_a_group_that_a_rank_is_not_in(rank: int, argument: str) -> None:
    group = dist.new_group([0])
    if rank == 1:
        said = _raises(TypeError, lambda: Clipper(net(), GlobalNorm(1.0), **{argument: group}))
        assert f"{argument} is what dist.new_group returns on a rank that is not in the group" in said


@on_ranks(2)
def test_a_mesh_of_two_axes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    said = _raises(Exception, lambda: Clipper(net(), GlobalNorm(1.0), stages=mesh).clip())
    assert "has 2 axes: pass one of them" in said


@pytest.mark.parametrize("value", ["nothing", "list", "elements", "meta", "complex"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("call", ["clip", "step"])
@on_ranks(2)
def test_a_bad_loss_on_one_rank(rank: int, call: str, first: bool, value: str) -> None:
    """The other rank, which waits in the step's message, raises too, and both go on after that."""
    model = DDP(nn.Linear(4, 4))
    opt = sgd(model)
    clipper = Clipper(model, SkipSpikes(use_loss=True))
    bad: Any = {
        "nothing": None,
        "list": [1.0],
        "elements": torch.ones(3),
        "meta": torch.ones((), device="meta"),
        "complex": torch.ones((), dtype=torch.complex64),
    }[value]

    def clip(loss: Any) -> Any:
        return clipper.clip(loss=loss) if call == "clip" else clipper.step(opt, loss=loss)

    if not first:
        _backward(model)
        clip(1.0)
        opt.zero_grad()
    _backward(model)
    said = _raises(Exception, lambda: clip(bad if rank else 1.0))
    assert ("loss" in said) if rank else ("another rank" in said)
    assert clip(2.0).loss.item() == 2.0


@pytest.mark.parametrize("value", [math.nan, 90.0])
@on_ranks(2)
def test_a_loss_that_is_bad_on_one_rank(rank: int, value: float) -> list[bool]:
    model = DDP(nn.Linear(4, 4))
    clipper = Clipper(model, SkipSpikes(4, 3.0, min_history=3, use_loss=True))
    skipped = []
    for step in range(5):
        model.zero_grad()
        _backward(model)
        loss = 2.0 + 0.01 * step if not (rank and step == 3) else value
        skipped.append(bool(clipper.clip(loss=loss).skipped))
    assert skipped == [False, False, False, True, False]
    return skipped
