"""A bucket of DDP's gradients, measured as it comes back from the average."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.measure.gathered import Gathered, is_simple
from distclip.measure.reduction import local_of
from distclip.torch_private.autograd import version
from distclip.torch_private.writes import addresses


class Bucket:
    """Gradients that are about to be averaged.

    Args:
        places: by parameter, where its gradient stands in the bucket: of those that count.
    """

    def __init__(self, gathered: Gathered, places: dict[int, int]) -> None:
        self._gathered, self._places = gathered, places
        for i in places:
            gathered.drop(i)
        self._before = self._states()
        self._averaged: dict[int, tuple[int, int, torch.dtype, int]] = {}

    def measure(self, bucket: dist.GradBucket) -> None:
        """It has been averaged."""
        gradients = bucket.gradients()
        averaged = [gradients[n] for n in self._places.values()]
        # DDP brings them into ``.grad`` at the end of backward: not before then are they what was measured.
        self._gathered.measure(list(self._places), averaged)
        for i, g, address in zip(self._places, averaged, addresses(averaged), strict=True):
            self._averaged[i] = address, version(g), g.dtype, g.numel()

    def note(self) -> None:
        """Those gradients that are now, to the last element, what DDP has averaged."""
        states = self._states()
        same: list[tuple[int, Tensor]] = []
        for i, (address, written, dtype, numel) in self._averaged.items():
            before, now = self._before.get(i), states.get(i)
            if before is None or now is None or now.gradient is not before.gradient:
                continue
            gradient: Any = self._gathered.parameters[i].grad
            local = local_of(gradient)
            if not is_simple(local) or local.dtype != dtype or local.numel() != numel:
                continue
            is_bucket = now.address == address and now.version == written
            # Else DDP has copied it there, in one operation, and nothing else has written.
            is_copy = now.address == before.address != address and now.version == before.version + 1
            if is_bucket or is_copy:
                same.append((i, gradient))
        self._gathered.note(same)

    def _states(self) -> dict[int, _State]:
        """Of the gradients that there are on this rank."""
        parameters = self._gathered.parameters
        there = {i: gradient for i in self._places if (gradient := parameters[i].grad) is not None}
        locals_ = list(map(local_of, there.values()))
        return {
            i: _State(weakref.ref(gradient), address, version(local))
            for (i, gradient), local, address in zip(there.items(), locals_, addresses(locals_), strict=True)
        }


class _State(NamedTuple):
    gradient: weakref.ref[Tensor]
    address: int
    version: int
