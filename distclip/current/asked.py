"""What this rank is asked for, in words by which ranks see whether all are asked for the same."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch.distributed as dist

from distclip.current.as_called import AsCalled
from distclip.measure.reduction import WORDS
from distclip.planning.settings import settings_of, state_of
from distclip.strategies._base import Strategy


class Asked:
    """The strategy with its arguments, what is passed beside it, and what is asked of this step.

    Attributes:
        options: as passed; they may change.
        of_step: what is asked of this step.
        loss_scale: of the scaler that this rank is passed, read where ranks look closer.
        looks: whether ranks look closer in this step.
        settled: the settings that have been agreed upon.
        param_norms: whether ranks have agreed that parameters are measured at times.
    """

    def __init__(self, strategy: Strategy, options: Mapping[str, object]) -> None:
        self._strategy, self.options = strategy, dict(options)
        self.of_step = ""
        self.loss_scale: Callable[[], float | None] | None = None
        self.looks = False
        self.settled: dict[str, str] = {}
        self.param_norms = False
        self.state_is_settled = not strategy.state_dict()  # a drop-in has none

    def settings(self) -> dict[str, str]:
        """Those that stay."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return {}
        return settings_of(self._strategy, self.options)

    def is_set_otherwise(self) -> bool:
        """Whether these are others than were agreed upon. (A drop-in is told them in each call.)"""
        return not isinstance(self._strategy, AsCalled) and self.settings() != self.settled

    def sizes_differ(self) -> bool:
        """Whether a rank that measures each parameter sends more numbers than one that does not."""
        return not (self._strategy.per_parameter or self._strategy.per_unit)

    def now(self, param_norms: bool | None) -> str:
        """What is asked of this step. ``param_norms``: None where ranks may differ in it."""
        asked = self.of_step
        if asked and param_norms is not None:
            asked = f"{asked}, {param_norms=}"
        if self.loss_scale is None or not self.looks:
            return asked
        return f"{asked}, loss scale {self.loss_scale()}"

    def whole(self, param_norms: bool | None) -> dict[str, str]:
        return self.settings() | {"call": self.now(param_norms)}

    def for_plan(self, param_norms: bool) -> dict[str, str]:
        """What is agreed upon when a plan is made; from then on it is settled."""
        self.settled = self.settings()
        self.param_norms = self.param_norms or param_norms
        if not self.settled:
            return {}
        more = {
            "options": f"{self.settled['options']}, {param_norms=}",
            "call": self.now(None),
        }
        if not self.state_is_settled:
            more["state"] = state_of(self._strategy)
        return self.settled | more


@lru_cache(maxsize=256)
def word_of(asked: str) -> int:
    """A number that stands for it; 0, which says nothing, for nothing."""
    return 1 + zlib.crc32(asked.encode()) % (WORDS - 1) if asked else 0
