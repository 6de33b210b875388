"""25: what was declared goes on holding, whatever the program does to its model, or is missed everywhere."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

import distclip
from tests.faults.ways import BOUND, Way, assert_right, clipping
from tests.harness import on_ranks
from tests.layouts import mesh1


class Net(nn.Module):
    """A dense layer, and an expert of its own on every rank: of other values, unless ``alike``."""

    def __init__(self, alike: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 4)
        torch.manual_seed(0 if alike else 1 + dist.get_rank())
        self.expert = nn.Linear(4, 4)


def backward(model: Any) -> None:
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model)
    model.zero_grad()
    x = torch.ones(2, 4, dtype=model.expert.weight.dtype)
    (model.dense(x).sum() + model.expert(x * (1 + 3 * dist.get_rank())).sum()).backward()


def gathered(model: nn.Module) -> Callable[[], Sequence[Tensor | None]]:
    """What the ranks hold of the experts, and the dense layer once."""

    def dense() -> Sequence[Tensor | None]:
        own = [
            p.grad.double().clone()
            for n, p in model.named_parameters()
            if "expert" in n and p.grad is not None
        ]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        rest = [
            p.grad.double().clone()
            for n, p in model.named_parameters()
            if "expert" not in n and p.grad is not None
        ]
        return [*rest, *(g for part in parts for g in part)]

    return dense


def world() -> Any:
    return dist.group.WORLD


def of_module(model: Net) -> None:
    distclip.declare(model.expert, sharded_over=world())


def of_parameters(model: Net) -> None:
    for p in model.expert.parameters():
        distclip.declare(p, sharded_over=world())


def of_parent(model: Net) -> None:
    """The parent first, then what differs in it."""
    distclip.declare(model, sharded_over=())
    distclip.declare(model.expert, sharded_over=world())


def of_mesh(model: Net) -> None:
    distclip.declare(model.expert, sharded_over=mesh1(2))


SAID = {f.__name__: f for f in (of_module, of_parameters, of_parent, of_mesh)}


def assigned(m: Net) -> Net:
    m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    return m


def emptied(m: Net) -> Net:
    state = copy.deepcopy(m.state_dict())
    m.to("meta").to_empty(device="cpu")
    m.load_state_dict(state)
    return m


def replaced(m: Net) -> Net:
    m.expert = copy.copy(nn.Linear(4, 4))
    return m


def parameter_replaced(m: Net) -> Net:
    m.expert.weight = nn.Parameter(m.expert.weight.detach().clone())
    return m


def other_bias(m: Net) -> Net:
    m.expert.bias = None
    return m


def pickled(m: Net) -> Net:
    return pickle.loads(pickle.dumps(m))  # type: ignore[no-any-return]


def saved(m: Net) -> Net:
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def swapped_dtype(m: Net) -> Net:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return m.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def checkpointed(m: Net) -> Net:
    apply_activation_checkpointing(m, check_fn=lambda c: isinstance(c, nn.Linear))
    return m


def compiled_child(m: Net) -> Net:
    m.expert = torch.compile(m.expert, backend="eager")  # type: ignore[assignment]
    return m


def weight_normed(m: Net) -> Net:
    parametrizations.weight_norm(m.expert)
    return m


# What happens, and what it does to a declaration of the module, of its parameters: right (""), an error.
HAPPENS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "nothing": (lambda m: m, "", ""),
    "load_state_dict": (lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict())), m)[1], "", ""),
    "load_state_dict(assign=True)": (assigned, "", "error"),
    "to meta and to_empty": (emptied, "", "error"),
    "the module replaced": (replaced, "error", "error"),
    "a parameter replaced": (parameter_replaced, "", "error"),
    "a parameter removed": (other_bias, "error", ""),
    "a deep copy": (copy.deepcopy, "", "OwnershipError"),  # that of an object is said of this object
    "a pickle": (pickled, "error", "OwnershipError"),
    "torch.save": (saved, "error", "OwnershipError"),
    "double()": (lambda m: m.double(), "", ""),
    "double(), swapping": (swapped_dtype, "", "either"),  # known or not that others took their place
    "compiled": (lambda m: torch.compile(m, backend="eager"), "", ""),
    "compiled in place": (lambda m: (m.compile(backend="eager"), m)[1], "", ""),
    "a compiled child": (compiled_child, "", ""),
    "checkpointed": (checkpointed, "", ""),
    "weight_norm": (weight_normed, "error", "error"),
}


def happens(kind: str, said: str, m: Net) -> tuple[Any, str]:
    change, of_a_module, of_a_parameter = HAPPENS[kind]
    return change(m), of_a_parameter if said == "of_parameters" else of_a_module


def outcome(clip: Callable[[], Any], m: Any, want: str) -> str:
    """Its text, where an error is right."""
    backward(m)
    if not want:
        assert_right(clip, m, gathered(m))
        return ""
    if want == "either":
        with contextlib.suppress(distclip.OwnershipError):
            assert_right(clip, m, gathered(m))
        return ""
    with pytest.raises(distclip.OwnershipError) as caught:
        clip()
    return re.sub(r"on rank \d", "here", str(caught.value))


ROWS = [
    *((way, "of_module") for way in ("clip", "step, overlap", "function", "list", "accelerate")),
    *((way, said) for way in ("clip", "list") for said in ("of_parameters", "of_parent")),
    ("function", "of_mesh"),
]


@pytest.mark.parametrize(("way", "said"), ROWS)
@on_ranks(2)
def test_25_before_the_first_clip(rank: int, said: str, way: str) -> list[str]:
    told = []
    for kind in HAPPENS:
        m = Net()
        SAID[said](m)
        m, want = happens(kind, said, m)
        with clipping(way, m) as clip:
            told.append(outcome(clip, m, want))
        del m, clip
    return told


@pytest.mark.parametrize(("way", "said"), ROWS)
@on_ranks(2)
def test_25_after_the_first_clip(rank: int, said: str, way: str) -> list[str]:
    told = []
    for kind in HAPPENS:
        m = Net()
        SAID[said](m)
        with clipping(way, m) as clip:
            for _ in range(2):
                outcome(clip, m, "")
            after, want = happens(kind, said, m)
            if after is m:
                told.append(outcome(clip, m, want))
        del m, clip, after
    return told


@pytest.mark.parametrize("way", ["clip", "function", "list", "accelerate"])
@on_ranks(2)
def test_25_said_after_the_first_clip(rank: int, way: str) -> None:
    """Also otherwise than before, and taken back."""
    m = Net(alike=True)
    with clipping(way, m) as clip:
        for shard in (None, world(), (), mesh1(2), ()):
            if shard is not None:
                distclip.declare(m.expert, sharded_over=shard)
            for _ in range(2):
                backward(m)
                if not shard:
                    for p in m.expert.parameters():
                        p.grad = torch.ones_like(p)
                assert_right(clip, m, gathered(m) if shard else None)


@on_ranks(2)
def test_25_said_on_one_rank_only(rank: int) -> str:
    m = Net()
    if rank:
        of_module(m)
    backward(m)
    with pytest.raises(distclip.OwnershipError):
        distclip.Clipper(m, distclip.GlobalNorm(BOUND)).clip()
    return "on both"


# --- tied copies, which count once ----------------------------------------------------------------------


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.own = nn.Linear(4, 4 + dist.get_rank())


TIED: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "nothing": (lambda m: m, True),
    "assign": (assigned, True),
    "empty": (emptied, True),
    "deep copy": (copy.deepcopy, True),
    "double": (lambda m: m.double(), True),
    "replaced": (lambda m: (setattr(m, "embed", nn.Embedding(6, 4)), m)[1], False),
    "pickle": (pickled, False),
    "of another size": (lambda m: (setattr(m, "embed", nn.Embedding(7, 4)), m)[1], False),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("way", ["clip", "function"])
@on_ranks(2)
def test_25_tied(rank: int, way: str, later: bool) -> list[str]:
    told = []
    for kind, (change, keeps) in TIED.items():
        m = Stage()
        distclip.declare(m.embed, tied_over=world())

        def filled(m: Any) -> list[Tensor]:
            for p in m.parameters():
                p.grad = torch.full_like(p, 1.0 + dist.get_rank())
            m.embed.weight.grad.fill_(3.0)
            parts: list[Any] = [None, None]
            dist.all_gather_object(parts, [p.grad.double().clone() for p in m.own.parameters()])
            return [m.embed.weight.grad.double().clone(), *parts[0], *parts[1]]

        def right(way: Any, m: Any, dense: list[Tensor]) -> None:
            want = torch.cat([g.flatten() for g in dense]).norm().item()
            assert way().item() == pytest.approx(want, rel=1e-5)

        if later:
            with clipping(way, m, stages=world()) as clip:
                right(clip, m, filled(m))
                after = change(m)
                if after is not m or kind == "of another size":
                    continue
                dense = filled(m)
                if keeps:
                    right(clip, m, dense)
                else:
                    told.append(refused(clip))
            continue
        m = change(m)
        if kind == "of another size":
            continue  # nothing reminds of the first
        with clipping(way, m, stages=world()) as clip:
            dense = filled(m)
            if keeps:
                right(clip, m, dense)
            else:
                told.append(refused(clip))
        del m, clip
    return told


def refused(clip: Way) -> str:
    with pytest.raises(distclip.OwnershipError, match=r"declare|Declare") as caught:
        clip()
    return str(caught.value)


# --- what makes DTensors or replicas of it --------------------------------------------------------------


@pytest.mark.parametrize("said", ["of_module", "of_parameters"])
@pytest.mark.parametrize("later", [False, True])
@on_ranks(2)
def test_25_fully_shard(rank: int, said: str, later: bool) -> str:
    """Over the axis that was declared, it is the tensor that tells: nothing may be counted twice."""
    m = Net(alike=True)
    SAID[said](m)
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    if later:
        backward(m)
        clipper.clip()
    fully_shard(m.expert, mesh=mesh1(2))
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(distclip.OwnershipError, match="declare") as caught:
        clipper.clip()
    return str(caught.value)


@on_ranks(4)
def test_25_fully_shard_over_another_axis(rank: int) -> None:
    from tests.layouts import mesh2

    mesh = mesh2(2, 2, "edp", "ep")
    torch.manual_seed(mesh["ep"].get_local_rank())
    m = nn.ModuleDict({"expert": nn.Linear(4, 4)})
    distclip.declare(m["expert"], sharded_over=mesh["ep"])
    clipper = distclip.Clipper(m, distclip.GlobalNorm(BOUND))
    for later in (False, True):
        if later:
            fully_shard(m["expert"], mesh=mesh["edp"])
        for p in m.parameters():
            p.grad = torch.full_like(p, 1.0 + mesh["ep"].get_local_rank())
        want = (20 * (1 + 4)) ** 0.5
        assert clipper.clip().total_norm.item() == pytest.approx(want, rel=1e-5)


@on_ranks(4)
def test_25_ddp(rank: int) -> None:
    """An expert of each pair, averaged over the other pair."""
    from tests.layouts import mesh2

    mesh = mesh2(2, 2, "dp", "ep")
    torch.manual_seed(mesh["ep"].get_local_rank())
    m = nn.Linear(4, 4)
    distclip.declare(m, sharded_over=mesh["ep"])
    ddp = nn.parallel.DistributedDataParallel(m, process_group=mesh.get_group("dp"))

    def dense() -> list[Tensor]:
        parts: list[Any] = [None, None]
        dist.all_gather_object(
            parts, [p.grad.double().clone() for p in m.parameters()], group=mesh.get_group("ep")
        )
        return [*parts[0], *parts[1]]

    for source in (ddp, m, list(m.parameters()), torch.optim.SGD(m.parameters(), lr=0.1)):
        clipper = distclip.Clipper(source, distclip.GlobalNorm(BOUND))
        for step in range(3):
            ddp.zero_grad()
            ddp(torch.full((2, 4), 1.0 + rank + step)).sum().backward()
            assert_right(lambda c=clipper: c.clip().total_norm, m, dense)  # type: ignore[misc]


@on_ranks(2)
def test_25_one_of_two_names(rank: int) -> None:
    """A shared parameter is one, under whichever name it was declared."""
    for first in (True, False):
        torch.manual_seed(rank)
        m = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
        m["b"].weight = m["a"].weight
        distclip.declare(m["a" if first else "b"], sharded_over=world())
        m["a"].weight.grad = torch.full((4, 4), 1.0 + rank)
        want = (16 * (1 + 4)) ** 0.5
        assert distclip.clip_grad_norm_(m, BOUND).item() == pytest.approx(want, rel=1e-5)


@on_ranks(2)
def test_25_modules_in_a_list(rank: int) -> None:
    dense, experts = Net(alike=True).dense, Net()
    distclip.declare(experts.expert, sharded_over=world())
    del experts.dense
    for p in dense.parameters():
        p.grad = torch.ones_like(p)
    for p in experts.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    want = (20 + 20 * (1 + 4)) ** 0.5
    clipper = distclip.Clipper([dense, experts], distclip.GlobalNorm(100.0))
    assert clipper.clip().total_norm.item() == pytest.approx(want, rel=1e-5)
    experts.expert = nn.Linear(4, 4)
    for p in experts.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(distclip.OwnershipError, match="declare"):
        clipper.clip()


def test_25_one_process_needs_no_groups() -> None:
    """``local`` is all that can be declared without any; a pickle of it is an error all the same."""
    m = nn.Linear(4, 4)
    distclip.declare(m, local=True)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    assert distclip.total_grad_norm(copy.deepcopy(m)) == 0
    again = pickle.loads(pickle.dumps(m))
    for p in again.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'weight' of Linear \(declared local\), .* cannot be kept.*pickle"):
        distclip.clip_grad_norm_(again, BOUND)
    distclip.declare(again, local=True)
    assert distclip.clip_grad_norm_(again, BOUND).item() == pytest.approx(20**0.5)
