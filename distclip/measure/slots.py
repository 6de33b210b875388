"""Slots: the norms that one step asks for, and which parameter counts towards which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from distclip import kernels
from distclip.decide.transfer import on_device
from distclip.measure.gradients import Bucket
from distclip.planning.plan import Plan
from distclip.strategies._base import Strategy


@dataclass(frozen=True, eq=False)
class Slots:
    """``of[i]`` is the slot of parameter i; one number per slot travels in the step's message."""

    labels: tuple[str, ...]  # [num_slots]
    of: tuple[int, ...]  # [num_parameters]
    # Made once for each list of runs.
    _indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        return len(self.labels)

    @cached_property
    def are_distinct(self) -> bool:
        """Whether no two parameters share one."""
        return len(set(self.of)) == len(self.of)

    def scale_(self, bucket: Bucket, coefficient: Tensor, rows: Mapping[int, Tensor] | None = None) -> None:
        """Multiply each gradient by the coefficient of its slot, [num_slots] float32 or float64."""
        owners = self.index(tuple(bucket.parameters), coefficient.device)
        kernels.scale_each_(bucket.tensors, coefficient[owners].to(bucket.tensors[0].device))

    def index(self, parameters: tuple[int, ...], device: torch.device) -> Tensor:
        """The slots of some parameters, [len(parameters)] int64."""
        key = (device, parameters)
        found = self._indices.get(key)
        if found is None:  # another thread may drop it at any time: it is never looked up twice
            if len(self._indices) >= 64:  # gradients that come and go: keep the memory bounded
                self._indices.clear()
            found = self._indices[key] = on_device([self.of[i] for i in parameters], torch.int64, device)
        return found


def slots_of(strategy: Strategy, plan: Plan) -> Slots:
    """One slot per parameter, or per group of the strategy."""
    if strategy.per_parameter:
        return per_parameter(plan)
    return Slots(strategy.groups, tuple(strategy.group_of(p) for p in plan.parameters))


def per_parameter(plan: Plan) -> Slots:
    return Slots(plan.names, plan.rows)


def groups_of_every(strategy: Strategy, plan: Plan) -> tuple[int, ...]:
    """The strategy's slot of each parameter of all stages."""
    return tuple(strategy.group_of(p) for p in plan.every)
