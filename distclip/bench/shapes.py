"""The shapes of models whose gradients are clipped, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Parameters by layer; a layer is what FSDP shards as one unit."""

    name: str
    layers: tuple[tuple[Shape, ...], ...]

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.layers))

    @property
    def num_elements(self) -> int:
        return sum(prod(shape) for layer in self.layers for shape in layer)


def small(scale: float = 1.0) -> Shapes:
    """720 small tensors, 13 M elements: what a deep, narrow model has."""
    d = _sized(208, scale)
    return Shapes("small", (((d, d),) * 5 + ((d,),) * 7,) * 60)


def many(scale: float = 1.0) -> Shapes:
    """1600 small tensors, 3 M elements: of which torch makes tables at the first call with DTensors."""
    d = _sized(48, scale)
    return Shapes("many", (((d, d),) * 13 + ((d,),) * 3,) * 100)


def medium(scale: float = 1.0) -> Shapes:
    """216 tensors, 63 M elements: 24 transformer layers of width 512."""
    d = _sized(512, scale)
    return Shapes("medium", (((d, d),) * 4 + ((2 * d, d),) * 3 + ((d,),) * 2,) * 24)


def llama(scale: float = 1 / 11) -> Shapes:
    """Llama-7B, 291 tensors, with all widths multiplied by ``scale`` (1: 6.7 G elements)."""
    d, hidden, words = _sized(4096, scale), _sized(11008, scale), _sized(32000, scale)
    layer = ((d, d),) * 4 + ((hidden, d),) * 2 + ((d, hidden),) + ((d,),) * 2
    return Shapes("llama", (((words, d),), *(layer,) * 32, ((d,), (words, d))))


def moe(scale: float = 1.0) -> Shapes:
    """100,000 tensors, 26 M elements: 100 layers of 333 small experts (``scale`` multiplies their number)."""
    experts = max(1, round(333 * scale))
    return Shapes("moe", (((16, 16),) * (3 * experts) + ((16,),),) * 100)


def _sized(width: int, scale: float) -> int:
    return max(8, round(width * scale / 8) * 8)


SHAPES: dict[str, Callable[..., Shapes]] = {f.__name__: f for f in (small, many, medium, llama, moe)}
