"""Law 15: names are those of the user's own module, whatever wraps it, in every place that shows one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parametrizations

import distclip
from tests.harness import on_ranks
from tests.layouts import mesh1

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Any) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


OWN = [n for n, _ in Net().named_parameters()]


def inside(wrap: Callable[[nn.Module], Any]) -> Callable[[Net], Net]:
    """Each block wrapped."""

    def change(m: Net) -> Net:
        for i, block in enumerate(m.blocks):
            m.blocks[i] = wrap(block)
        return m

    return change


def ddp(m: nn.Module) -> nn.Module:
    return DDP(m)


def fsdp1(m: nn.Module) -> nn.Module:
    return FSDP1(m, device_id=CPU, use_orig_params=True)


def compiled(m: nn.Module) -> Any:
    return torch.compile(m, backend="eager")


def sharded(m: nn.Module) -> nn.Module:
    return fully_shard(m, mesh=mesh1(2))  # type: ignore[return-value]


# From the innermost to the outermost.
WRAPPED: dict[str, list[Callable[[Any], Any]]] = {
    "nothing": [],
    "DataParallel": [nn.DataParallel],
    "checkpointed": [checkpoint_wrapper],
    "offloaded": [offload_wrapper],
    "blocks checkpointed": [inside(checkpoint_wrapper)],
    "compiled": [compiled],
    "blocks compiled": [inside(compiled)],
    "compiled twice": [inside(compiled), compiled],
    "blocks checkpointed, compiled": [inside(lambda b: compiled(checkpoint_wrapper(b))), compiled],
}
SPREAD: dict[str, list[Callable[[Any], Any]]] = {
    "DDP": [ddp],
    "DDP, compiled": [ddp, compiled],
    "compiled, DDP": [compiled, ddp],
    "blocks checkpointed and compiled, DDP": [inside(checkpoint_wrapper), inside(compiled), ddp],
    "compiled, DDP, compiled": [inside(compiled), ddp, compiled],
    "blocks in DDP": [inside(ddp)],
    "FSDP1": [fsdp1],
    "blocks, FSDP1": [inside(fsdp1), fsdp1],
    "checkpointed, FSDP1": [inside(checkpoint_wrapper), inside(fsdp1), fsdp1],
    "FSDP1, checkpointed": [inside(fsdp1), inside(checkpoint_wrapper), fsdp1],
    "FSDP1, compiled": [inside(fsdp1), fsdp1, compiled],
    "FSDP2": [inside(sharded), sharded],
    "checkpointed, FSDP2": [inside(checkpoint_wrapper), inside(sharded), sharded],
    "FSDP2, compiled": [inside(sharded), sharded, compiled],
    "blocks compiled, FSDP2": [inside(compiled), inside(sharded), sharded],
}


def names_are(m: Any, want: list[str], source: Any = None) -> None:
    """In plan, report, description, patterns, strategy state and errors."""
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    pattern = want[-1]
    strategy = distclip.PerGroup({pattern: 1e9, "*": 1e9})
    clipper = distclip.Clipper(m if source is None else source, strategy)
    report = clipper.clip(param_norms=True)
    assert list(clipper.plan.names) == want
    assert list(report.param_norms) == want
    text = str(clipper.describe())
    assert all(name in text for name in want)
    assert all(text.count(part) == "".join(want).count(part) for part in ATTRIBUTES[1:])
    learning = distclip.AdaGC(warmup=1)
    distclip.Clipper(m if source is None else source, learning).clip()
    assert learning.get_extra_state()["names"] == want
    with pytest.raises(ValueError, match=want[0].replace(".", r"\.")):
        distclip.Clipper(m, distclip.PerGroup({"nothing.so": 1.0})).clip()


@pytest.mark.filterwarnings("ignore::UserWarning")  # wrappers of torch's, on the CPU
@pytest.mark.parametrize("kind", WRAPPED)
def test_42_names(kind: str) -> None:
    m: Any = Net()
    for wrap in WRAPPED[kind]:
        m = wrap(m)
    names_are(m, OWN)
    names_are(m, OWN, source=list(m.named_parameters()))
    names_are(m, OWN, source=[p for group in [m.named_parameters()] for p in group])
    names_are(m, OWN, source=torch.optim.SGD(list(m.named_parameters()), lr=0.1))


@pytest.mark.parametrize("kinds", [list(SPREAD)[i::3] for i in range(3)], ids=lambda k: k[0])
@on_ranks(2)
def test_42_names_on_ranks(rank: int, kinds: list[str]) -> None:
    for kind in kinds:
        m: Any = Net()
        for wrap in SPREAD[kind]:
            m = wrap(m)
        names_are(m, OWN)
        if "FSDP1" not in kind:  # of which a list does not tell how it lies
            names_are(m, OWN, source=list(m.named_parameters()))
            names_are(m, OWN, source=torch.optim.SGD(list(m.named_parameters()), lr=0.1))


@on_ranks(2)
def test_42_names_of_an_fsdp1_list(rank: int) -> None:
    """Once the module has been seen, its parameters tell."""
    m = Net()
    for wrap in SPREAD["checkpointed, FSDP1"]:
        m = wrap(m)
    names_are(m, OWN)
    names_are(m, OWN, source=list(m.named_parameters()))


class Named(nn.Module):
    """The user's own attributes of these names stay, also where wrappers of the same stand around them."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.add_module(attribute, nn.Linear(2, 2))
        self.deep = nn.ModuleDict({attribute: nn.ModuleDict({attribute: nn.Linear(2, 2)})})


ATTRIBUTES = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("wrap", [[], [compiled], [checkpoint_wrapper, compiled], [nn.DataParallel]])
def test_42_attributes_of_the_users_own(attribute: str, wrap: list[Callable[[Any], Any]]) -> None:
    m: Any = Named(attribute)
    want = [n for n, _ in m.named_parameters()]
    for w in wrap:
        m = w(m)
    names_are(m, want)
    names_are(m, want, source=list(m.named_parameters()))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@on_ranks(2)
def test_42_attributes_of_the_users_own_in_ddp(rank: int, attribute: str) -> None:
    want = [n for n, _ in Named(attribute).named_parameters()]
    for m in (DDP(Named(attribute)), compiled(DDP(compiled(Named(attribute))))):
        names_are(m, want)
        names_are(m, want, source=list(m.named_parameters()))
        names_are(m, want, source=torch.optim.SGD(list(m.named_parameters()), lr=0.1))


def test_42_names_of_a_wrapper_that_is_gone() -> None:
    """What it called the parameters stays in the program's list."""
    m = Net()
    named = list(compiled(m).named_parameters())
    assert named[0][0].startswith("_orig_mod.")
    names_are(m, OWN, source=named)


def test_42_parametrizations_are_the_users() -> None:
    """weight_norm's own names stay: there are several parameters where there was one, and state dicts have
    these names too."""
    m = Net()
    parametrizations.weight_norm(m.embed)
    want = [n for n, _ in m.named_parameters()]
    assert "embed.parametrizations.weight.original0" in want
    names_are(m, want)


@on_ranks(2)
def test_42_names_in_errors_between_ranks(rank: int) -> str:
    m = Net()
    with torch.no_grad():
        m.blocks[1].weight.add_(float(rank))
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(distclip.OwnershipError, match=r"'blocks\.1\.weight'") as caught:
        distclip.Clipper(compiled(m), distclip.GlobalNorm(1.0)).clip()
    return str(caught.value).replace(f"on rank {rank}", "here")
