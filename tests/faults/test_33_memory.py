"""33: gradients that share memory, that have none of their own, or hold no numbers that can be scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import distclip
from distclip.layout.memory import Region, overlapping
from tests import oracle
from tests.faults.ways import BOUND, clipping
from tests.harness import on_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:(The PyTorch API of (MaskedTensors|nested tensors) is in prototype|Sparse CSR tensor):UserWarning"
)

ALL = ["clip", "clip, overlap", "step", "function", "list", "total", "value", "per parameter"]


class Own(Tensor):
    """A subclass whose elements lie in memory as those of any tensor."""


def two(*values: float) -> list[Tensor]:
    return [torch.full((4,), value) for value in values]


def sparse(index: list[int], values: Tensor, coalesced: bool = True) -> Tensor:
    return torch.sparse_coo_tensor([index], values, (6, *values.shape[1:]), is_coalesced=coalesced)


def separate() -> list[Tensor]:
    return two(3.0, 4.0)


def the_same() -> list[Tensor]:
    (one,) = two(3.0)
    return [one, one]


def other_shapes() -> list[Tensor]:
    memory = torch.arange(1.0, 9)
    return [memory, memory.view(2, 4), memory.view(2, 2, 2)]


def transposed() -> list[Tensor]:
    memory = torch.arange(1.0, 10).view(3, 3)
    return [memory, memory.t()]


def transposed_first() -> list[Tensor]:
    memory = torch.arange(1.0, 9).view(4, 2)
    return [memory.t(), memory]


def side_by_side() -> list[Tensor]:
    memory = torch.arange(1.0, 9)
    return [memory[:4], memory[4:]]


def interleaved() -> list[Tensor]:
    memory = torch.arange(1.0, 13).view(4, 3)
    return [memory[:, 0], memory[:, 1], memory[:, 2]]


def blocks() -> list[Tensor]:
    memory = torch.arange(1.0, 17).view(4, 4)
    return [memory[:2, :2], memory[:2, 2:], memory[2:]]


def parts_of_complex() -> list[Tensor]:
    memory = torch.view_as_real(torch.arange(1.0, 5).to(torch.complex64) * (1 + 2j))
    return [memory[:, 0], memory[:, 1]]


def empty() -> list[Tensor]:
    return [torch.zeros(0), torch.zeros(0, 3), *two(3.0), torch.zeros(4, 0)]


def expanded() -> list[Tensor]:
    """As ``autograd.grad(p.sum() + q.sum(), [p, q])`` returns them: two gradients, one number in memory."""
    number = torch.tensor(3.0)
    return [number.expand(4), number.expand(4)]


def windows() -> list[Tensor]:
    return [torch.arange(1.0, 6).as_strided((3, 3), (1, 1)), *two(2.0)]


def sparse_the_same() -> list[Tensor]:
    one = sparse([1, 3], torch.ones(2, 2))
    return [one, one]


def sparse_of_one_memory() -> list[Tensor]:
    one = sparse([1, 3], torch.ones(2, 2))
    return [one, one.detach()]


def sparse_with_shared_values() -> list[Tensor]:
    values = torch.arange(1.0, 5).view(2, 2)
    return [sparse([1, 3], values), sparse([0, 5], values), sparse([2], values[:1])]


def sparse_repeated_with_shared_values() -> list[Tensor]:
    values = torch.arange(1.0, 5).view(2, 2)
    return [sparse([1, 1], values, False), sparse([0, 5], values, False)]


def sparse_expanded() -> list[Tensor]:
    return [sparse([1, 3], torch.ones(1, 1).expand(2, 2)), sparse([1, 4], torch.ones(1, 1).expand(2, 2))]


def sparse_empty() -> list[Tensor]:
    return [sparse([], torch.zeros(0, 2)), sparse([], torch.zeros(0, 2)), *two(3.0)]


def conjugate() -> list[Tensor]:
    memory = torch.arange(1.0, 5) * (1 + 2j)
    return [memory.conj(), memory]


def in_flight() -> list[Tensor]:
    return [AsyncCollectiveTensor(g) for g in two(3.0, 4.0)]


def own_class() -> list[Tensor]:
    return [g.as_subclass(Own) for g in two(3.0, 4.0)]


# How many of them are gradients of their own, each counted once.
RIGHT: dict[Callable[[], list[Tensor]], list[int]] = {
    separate: [0, 1],
    the_same: [0],
    other_shapes: [0],
    transposed: [0],
    transposed_first: [0],
    side_by_side: [0, 1],
    interleaved: [0, 1, 2],
    blocks: [0, 1, 2],
    parts_of_complex: [0, 1],
    empty: [2],
    expanded: [0, 1],
    windows: [0, 1],
    sparse_the_same: [0],
    sparse_of_one_memory: [0],
    sparse_with_shared_values: [0, 1, 2],
    sparse_repeated_with_shared_values: [0, 1],
    sparse_expanded: [0, 1],
    sparse_empty: [2],
    conjugate: [0, 1],
    in_flight: [0, 1],
    own_class: [0, 1],
}


def wrapped() -> list[Tensor]:
    return [TwoTensor(g, g) for g in two(3.0, 4.0)]


def wrapped_alone() -> list[Tensor]:
    return [*two(3.0), TwoTensor(*two(4.0, 4.0))]


def masked() -> list[Tensor]:
    return [masked_tensor(*two(3.0), torch.tensor([True, False, True, True])), *two(4.0)]


def jagged() -> list[Tensor]:
    return [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)]


def compressed() -> list[Tensor]:
    return [torch.eye(3).to_sparse_csr()]


def eight_bits() -> list[Tensor]:
    return [g.to(torch.float8_e4m3fn) for g in two(3.0, 4.0)]


def whole_numbers() -> list[Tensor]:
    return [g.long() for g in two(3.0, 4.0)]


def partly_shared() -> list[Tensor]:
    memory = torch.arange(1.0, 7)
    return [memory[:4], memory[2:]]


def other_strides() -> list[Tensor]:
    memory = torch.arange(1.0, 9)
    return [memory[:4], memory[::2]]


def a_view_of_the_real_part() -> list[Tensor]:
    memory = torch.arange(1.0, 5) * (1 + 2j)
    return [memory, torch.view_as_real(memory)[:, 0]]


REFUSED: dict[Callable[[], list[Tensor]], str] = {
    wrapped: "0 is a TwoTensor",
    wrapped_alone: "1 is a TwoTensor",
    masked: "0 is a MaskedTensor",
    jagged: "0 is a NestedTensor",
    compressed: "0 is of layout torch.sparse_csr",
    eight_bits: "0 is of dtype torch.float8_e4m3fn",
    whole_numbers: "0 is of dtype torch.int64",
    partly_shared: "0 and 1 share a part of their memory",
    other_strides: "0 and 1 share a part of their memory",
    a_view_of_the_real_part: "0 and 1 share a part of their memory",
}


class Model(nn.Module):
    """Parameters named 0, 1, …, with these gradients."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        for i, gradient in enumerate(gradients):
            kind = gradient.dtype
            if isinstance(gradient, TwoTensor) or gradient.is_nested or gradient.layout is torch.sparse_csr:
                value = gradient.clone()
            else:
                value = torch.zeros(gradient.shape, dtype=kind)
            trains = kind.is_floating_point or kind.is_complex
            self.register_parameter(str(i), nn.Parameter(value, requires_grad=trains))
            self.get_parameter(str(i)).grad = gradient

    @property
    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.parameters()]


def clip(way: str, model: Model) -> Tensor | None:
    if way == "total":
        return distclip.total_grad_norm(model)
    if way == "value":
        return distclip.clip_grad_value_(model, 0.5)
    if way == "per parameter":
        return distclip.Clipper(model, distclip.PerParameter(math.inf)).clip(param_norms=True).total_norm
    with clipping(way, model) as clip:
        return clip()


def rows(
    table: Iterable[Callable[[], list[Tensor]]], by_accelerate: Sequence[Callable[[], list[Tensor]]]
) -> list[Any]:
    """All ways; of the dearest a few."""
    found = [(make, way) for make in table for way in ALL] + [(make, "accelerate") for make in by_accelerate]
    return [pytest.param(make, way, id=f"{make.__name__}, {way}") for make, way in found]


@pytest.mark.parametrize(("make", "way"), rows(RIGHT, [interleaved, expanded, sparse_with_shared_values]))
def test_33_each_element_once(make: Callable[[], list[Tensor]], way: str) -> None:
    model = Model(make())
    before = oracle.dense_gradients(model.parameters())
    want = oracle.norm([before[i] for i in RIGHT[make]])
    for call in range(2):  # once planned, and once as before
        got = clip(way, model)
        if way != "value":
            assert got is not None
            assert got.item() == pytest.approx(want, rel=1e-6), call
        if way not in ("total", "per parameter"):
            break
    share = {"total": 1.0, "per parameter": 1.0}.get(way, BOUND / want)
    for p, b in zip(model.parameters(), before, strict=True):
        assert b is not None
        after = oracle.dense(p.grad)
        if way != "value":
            torch.testing.assert_close(after, b * share, rtol=1e-5, atol=1e-12)
        else:
            large = b.abs() > 0.5
            torch.testing.assert_close(after, torch.where(large, b / b.abs() * 0.5, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("make", "way"), rows(REFUSED, [wrapped, eight_bits, partly_shared]))
def test_33_refused_by_name(make: Callable[[], list[Tensor]], way: str) -> None:
    model = Model(make())
    before = [
        None if type(g) is not Tensor or g.is_nested else g.clone() for g in model.gradients if g is not None
    ]
    with pytest.raises(ValueError, match=r"gradients? of ") as error:
        clip(way, model)
    said = str(error.value).replace("parameters[0]", "0").replace("parameters[1]", "1")
    assert REFUSED[make] in said
    assert "before the clip" in said
    for b, g in zip(before, model.gradients, strict=True):
        if b is not None:
            assert g is not None
            torch.testing.assert_close(g, b, rtol=0, atol=0)


def test_33_the_norm_of_given_gradients() -> None:
    with pytest.raises(ValueError, match=r"the gradient of tensors\[0\] is a TwoTensor"):
        distclip.get_total_norm(wrapped())
    assert distclip.get_total_norm(separate()).item() == 10.0


@pytest.mark.parametrize("way", ["clip", "step", "function"])
def test_33_found_later_too(way: str) -> None:
    """What the first steps had found in order."""
    for make in (wrapped, wrapped_alone, masked, partly_shared, other_strides):
        model, gradients = Model([torch.ones(4), torch.ones(4)]), make()
        with clipping(way, model) as clip:
            for _ in range(4):  # at the next call nothing is looked at but what changes from step to step
                clip()
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g
            with pytest.raises(ValueError, match=r"gradients? of ") as error:
                clip()
            assert REFUSED[make][2:] in str(error.value).replace("parameters[1]", "1")


def test_33_nested_parameters() -> None:
    p = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    for clip in (
        distclip.Clipper([p], distclip.GlobalNorm(1.0)).clip,
        lambda: distclip.clip_grad_norm_([p], 1.0),
    ):
        with pytest.raises(ValueError, match=r"parameters\[0\] is a nested tensor"):
            clip()


@pytest.mark.parametrize("way", ["clip", "step", "function", "AGC", "infinite", "param_norms"])
@pytest.mark.parametrize("kind", ["wrapped", "overlapping"])
@on_ranks(2)
def test_33_on_one_rank_only(rank: int, kind: str, way: str) -> None:
    """Nobody waits for the rank that refuses, and afterwards all go on."""
    mesh = init_device_mesh("cpu", (2,))
    ps = [nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])) for _ in range(2)]

    def give(odd: bool) -> None:
        memory = torch.ones(8, 2)
        for p, begin in zip(ps, (0, 2 if odd and kind == "overlapping" else 4), strict=True):
            local: Any = memory[begin : begin + 3]
            if odd and kind == "wrapped":
                local = TwoTensor(local, local)
            p.grad = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])
            p.grad._local_tensor = local

    strategy = {"AGC": distclip.AGC(0.01), "infinite": distclip.GlobalNorm(1e9, math.inf)}
    clipper = distclip.Clipper(ps, strategy.get(way, distclip.GlobalNorm(1e9)))
    optimizer = torch.optim.SGD(ps, lr=0.0)

    def clip() -> Tensor:
        if way == "function":
            return distclip.clip_grad_norm_(ps, 1e9)
        if way == "step":
            return clipper.step(optimizer).total_norm
        return clipper.clip(param_norms=way == "param_norms").total_norm

    want = 1.0 if way == "infinite" else math.sqrt(24)
    for step in range(6):
        refused = step in (0, 2, 3)
        give(refused and rank == 1)
        if refused:
            with pytest.raises((ValueError, distclip.OwnershipError)) as error:
                clip()
            mine = "TwoTensor" if kind == "wrapped" else "share a part of their memory"
            assert (mine if rank else "on another rank") in str(error.value)
        else:
            assert clip().item() == pytest.approx(want)


@pytest.mark.parametrize("way", ["clip", "function"])
@on_ranks(2)
def test_33_in_flight_within_dtensors(rank: int, way: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    ps = [nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])) for _ in range(2)]
    for p, g in zip(ps, two(3.0, 4.0), strict=True):
        p.grad = DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])
        p.grad._local_tensor = AsyncCollectiveTensor(g)  # type: ignore[attr-defined]
    clip = distclip.Clipper(ps, distclip.GlobalNorm(1e-3)).clip
    norm = distclip.clip_grad_norm_(ps, 1e-3) if way == "function" else clip().total_norm
    assert norm.item() == pytest.approx(math.sqrt(200))
    assert oracle.norm(oracle.dense_gradients(ps)) == pytest.approx(1e-3, rel=1e-4)


@on_ranks(2)
def test_33_mixed_up_kinds(rank: int) -> None:
    """A DTensor gradient of a plain parameter, and the other way round."""
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = (
        nn.Parameter(torch.zeros(8)),
        nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])),
    )
    for p, g in ((plain, DTensor.from_local(torch.ones(4), mesh, [Shard(0)])), (sharded, torch.ones(8))):
        p.grad = None
        clipper = distclip.Clipper([("p", p)], distclip.GlobalNorm(1.0))
        clipper.clip()
        p.grad = g
        with pytest.raises(ValueError, match="p is a DTensor") as error:
            clipper.clip()
        assert "plain" in str(error.value)


def test_33_regions_against_marking() -> None:
    """Whether two views share elements, against the sets of these."""
    torch.manual_seed(0)
    memory = torch.zeros(64)
    places = torch.arange(64)
    found = 0
    for _ in range(300):
        sizes = [torch.randint(1, 4, (2,)).tolist() for _ in range(2)]
        strides = [torch.randint(0, 7, (2,)).tolist() for _ in range(2)]
        begins = torch.randint(0, 20, (2,)).tolist()
        views = [
            places.as_strided(*layout).flatten().tolist()
            for layout in zip(sizes, strides, begins, strict=True)
        ]
        regions = [
            Region.of(memory.as_strided(*layout)) for layout in zip(sizes, strides, begins, strict=True)
        ]
        for region, view in zip(regions, views, strict=True):
            assert region.repeats == (len(set(view)) < len(view))
        shared = not set(views[0]).isdisjoint(views[1])
        found += shared
        assert (overlapping(regions) is not None) == shared
        if regions[0] == regions[1]:
            assert set(views[0]) == set(views[1])
    assert 0 < found < 300
