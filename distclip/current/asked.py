"""What this rank is asked for, in words by which ranks see whether all are asked for the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch.distributed as dist

from distclip.current.as_called import AsCalled
from distclip.measure.reduction import WORDS
from distclip.planning.settings import settings_of, state_of
from distclip.strategies._base import Strategy


class Beside(NamedTuple):
    """What travels in the message of a step beside the numbers that its strategy always wants."""

    param_norms: bool = False
    weighted: bool = False


class Asked:
    """The strategy with its arguments, what is passed beside it, and what is asked of this step.

    Attributes:
        options: as passed; they may change.
        of_step: what is asked of this step.
        looks: whether ranks look closer in this step.
        settled: the settings that have been agreed upon.
        beside: what is to be sent in this step.
        agreed: what ranks have agreed to send at times.
    """

    def __init__(self, strategy: Strategy, options: Mapping[str, object]) -> None:
        self._strategy, self.options = strategy, dict(options)
        self.of_step = ""
        self.looks = False
        self.settled: dict[str, str] = {}
        self.beside = self.agreed = Beside()
        self.state_is_settled = not strategy.state_dict()  # a drop-in has none

    def settings(self) -> dict[str, str]:
        """Those that stay."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return {}
        return settings_of(self._strategy, self.options)

    def is_set_otherwise(self) -> bool:
        """Whether these are others than were agreed upon. (A drop-in is told them in each call.)"""
        return not isinstance(self._strategy, AsCalled) and self.settings() != self.settled

    def is_first(self) -> bool:
        """Whether this step's message would be longer than ranks have agreed upon."""
        norms = not (self._strategy.per_parameter or self._strategy.per_unit)  # which they send anyway
        return (norms and self.beside.param_norms > self.agreed.param_norms) or (
            self.beside.weighted > self.agreed.weighted
        )

    def settle(self) -> None:
        """On what there is now."""
        self.settled = self.settings()
        self.agreed = Beside(*map(max, self.agreed, self.beside))

    def expected(self) -> Beside:
        """What others send in this step, if they are asked for the same, and as far as was agreed upon."""
        return Beside(self.beside.param_norms and self.agreed.param_norms, self.agreed.weighted)

    def now(self, *, sends: bool) -> str:
        """What is asked of this step. ``sends``: whether anything is sent in each, so that ranks must not
        differ in what."""
        if not (self.of_step and sends):
            return self.of_step
        return f"{self.of_step}, {_told(self.beside)}"

    def whole(self, *, sends: bool) -> dict[str, str]:
        return self.settings() | {"call": self.now(sends=sends)}

    def for_plan(self) -> dict[str, str]:
        """What is agreed upon when a plan is made; from then on it is settled."""
        self.settle()
        if not self.settled:
            return {}
        more = {
            "options": f"{self.settled['options']}, {_told(self.beside)}",
            "call": self.of_step,
        }
        if not self.state_is_settled:
            more["state"] = state_of(self._strategy)
        return self.settled | more


def _told(beside: Beside) -> str:
    return f"param_norms={beside.param_norms}" + (", weighted=True" if beside.weighted else "")


@lru_cache(maxsize=256)
def word_of(asked: str) -> int:
    """A number that stands for it; 0, which says nothing, for nothing."""
    return 1 + zlib.crc32(asked.encode()) % (WORDS - 1) if asked else 0
