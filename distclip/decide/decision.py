"""What a strategy decides: how the gradients of this step are to be changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Multiply gradients by coefficients.

    Attributes:
        coefficient: [] one for all gradients, or [num_slots] one for each slot; float32, in [0, 1].
        threshold: [] or [num_slots], what the norms were compared with (for the report).
        skip: [] bool, true where this optimizer step should not be taken at all.
    """

    coefficient: Tensor
    threshold: Tensor
    skip: Tensor | None = None


@dataclass(frozen=True)
class Clamp:
    """Clamp each gradient element to ``[-bound, bound]`` (a complex element by its magnitude).

    Attributes:
        bound: [] float32.
        skip: [] bool, true where this optimizer step should not be taken at all.
        clipped_norm: [] float32, the norm that is left, where the strategy knows it.
        direction: [] float32, the cosine between the gradient before and after, likewise.
        unit: what ``bound`` is measured in: from a parameter to a tensor like its local gradient, or None to
            leave that gradient alone. Elements whose unit is 0 are left alone too.
    """

    bound: Tensor
    skip: Tensor | None = None
    clipped_norm: Tensor | None = None
    direction: Tensor | None = None
    unit: Callable[[Tensor], Tensor | None] | None = None

    @property
    def threshold(self) -> Tensor:
        return self.bound


@dataclass(frozen=True)
class Then:
    """Scale first, then clamp the elements of what that leaves."""

    first: Scale
    second: Clamp

    @property
    def skip(self) -> Tensor | None:
        one, other = self.first.skip, self.second.skip
        return other if one is None else one if other is None else one | other

    @property
    def threshold(self) -> Tensor:
        return self.first.threshold


Decision: TypeAlias = Scale | Clamp | Then
