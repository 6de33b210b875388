"""Which memory the elements of a tensor lie in: whether two tensors share some, and one with itself."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import add, le

import torch
from torch import Tensor

from distclip.torch_private.operators import FakeTensor
from distclip.torch_private.tensors import storage_of
from distclip.torch_private.writes import address

_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEASURABLE = frozenset((*_REAL, torch.complex64, torch.complex128, torch.complex32))
"""In these dtypes elements can be summed and scaled."""

_Dims = tuple[tuple[int, int], ...]  # (size, stride) by stride, those that follow each other joined


def is_bare(tensor: Tensor) -> bool:
    """Whether its elements are numbers that lie in memory of its own, and all operators are torch's own."""
    return (
        has_memory(type(tensor))
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
    )


def has_memory(kind: type[Tensor]) -> bool:
    """Whether tensors of this class are not wrappers of others, which only their own operators look into.
    (Fake ones count as what they stand for.)"""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or issubclass(kind, FakeTensor)


@dataclass(frozen=True)
class Region:
    """Where the elements of a strided tensor lie, in whatever order its dimensions have.

    Attributes:
        space: what the addresses are of: the device, or the storage of a tensor that has no addresses.
        begin, end: addresses of the first byte, and after the last.
        itemsize: bytes of an element.
        dims: sizes, and strides in elements; of a tensor without gaps one dimension of stride 1.
    """

    space: Hashable
    begin: int
    end: int
    itemsize: int
    dims: _Dims

    @staticmethod
    def of(tensor: Tensor) -> Region:
        """Of a tensor that has elements."""
        itemsize, space, begin = tensor.element_size(), _space_of(tensor), _begin_of(tensor)
        if tensor.is_contiguous():
            numel = tensor.numel()
            return Region(space, begin, begin + numel * itemsize, itemsize, ((numel, 1),))
        dims = _joined(zip(tensor.shape, tensor.stride(), strict=True))
        return Region(space, begin, begin + _extent(dims) * itemsize, itemsize, dims)

    @property
    def repeats(self) -> bool:
        """Whether several elements lie in one place."""
        reach = 0
        for size, stride in self.dims:
            if stride <= reach:
                return _repeats(self.dims)
            reach += (size - 1) * stride
        return False

    def shares(self, other: Region) -> bool:
        """Whether any byte belongs to both."""
        if self.space != other.space or self.end <= other.begin or other.end <= self.begin:
            return False
        first, second = (self, other) if self.begin <= other.begin else (other, self)
        distance = second.begin - first.begin
        unit = math.gcd(first.itemsize, second.itemsize, distance)
        return _share(first._in_units(unit), second._in_units(unit), distance // unit)

    def _in_units(self, unit: int) -> _Dims:
        many = self.itemsize // unit
        return _joined([(many, 1), *((size, stride * many) for size, stride in self.dims)])


def overlapping(regions: list[Region]) -> tuple[int, int] | None:
    """The first two that share memory, by position."""
    order = sorted(range(len(regions)), key=lambda i: (hash(regions[i].space), regions[i].begin))
    open_: list[int] = []  # those that reach as far as where the next begins, or beyond
    for i in order:
        here = regions[i]
        open_ = [j for j in open_ if regions[j].end > here.begin and regions[j].space == here.space]
        for j in open_:
            if here.shares(regions[j]):
                return min(i, j), max(i, j)
        open_.append(i)
    return None


def lie_apart(addresses: list[int], sizes: list[int]) -> bool:
    """Whether stretches of memory, of ``sizes`` bytes > 0 each, have no byte in common."""
    ends = list(map(add, addresses, sizes))
    if all(map(le, ends, addresses[1:])):  # they are in order
        return True
    # No more have begun anywhere than have ended, and one.
    return all(map(le, sorted(ends), sorted(addresses)[1:]))


def _space_of(tensor: Tensor) -> Hashable:
    return storage_of(tensor) if isinstance(tensor, FakeTensor) else tensor.device


def _begin_of(tensor: Tensor) -> int:
    if isinstance(tensor, FakeTensor):
        return int(tensor.storage_offset()) * tensor.element_size()
    return address(tensor)


def _joined(dims: Iterable[tuple[int, int]]) -> _Dims:
    joined: list[tuple[int, int]] = []
    for size, stride in sorted(((s, t) for s, t in dims if s > 1), key=lambda dim: dim[1]):
        if joined and stride == joined[-1][0] * joined[-1][1]:
            joined[-1] = (joined[-1][0] * size, joined[-1][1])
        else:
            joined.append((size, stride))
    return tuple(joined) or ((1, 1),)


def _extent(dims: _Dims) -> int:
    return 1 + sum((size - 1) * stride for size, stride in dims)


def _view(memory: Tensor, dims: _Dims, offset: int = 0) -> Tensor:
    return memory.as_strided([size for size, _ in dims], [stride for _, stride in dims], offset)


# By marking memory of a byte for each place. (There is no quick way that is right for all strides.)


@lru_cache(maxsize=1024)
def _repeats(dims: _Dims) -> bool:
    memory = torch.zeros(_extent(dims), dtype=torch.bool, device="cpu")
    _view(memory, dims).fill_(True)
    return int(memory.sum()) < math.prod(size for size, _ in dims)


@lru_cache(maxsize=4096)
def _share(first: _Dims, second: _Dims, distance: int) -> bool:
    memory = torch.zeros(max(_extent(first), distance + _extent(second)), dtype=torch.bool, device="cpu")
    _view(memory, first).fill_(True)
    return bool(_view(memory, second, distance).any())
