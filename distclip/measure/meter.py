"""Measure: from this rank's gradients, through the step's one collective, to the norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distclip import kernels
from distclip.decide.norms import Norms, regroup
from distclip.decide.transfer import on_device
from distclip.measure.gradients import Gradients
from distclip.measure.reduction import News, reduce_message
from distclip.measure.slots import Slots
from distclip.planning.plan import Plan


class Meter:
    """Takes the norms of one set of slots. Which gradients exist may change from step to step; the
    length of the message and the collective do not.

    Args:
        accumulate: dtype of the local sums of squares, float32 or float64.
        extra: further sums over the elements of one gradient that are wanted, and how many.
    """

    def __init__(
        self,
        plan: Plan,
        slots: Slots,
        norm_type: float,
        accumulate: torch.dtype,
        extra: tuple[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._extra = extra
        self.plan, self.slots = plan, slots
        self._norm_type, self._accumulate = norm_type, accumulate
        # By the parameters in a bucket: 1 / multiplicity, on the bucket's device.
        self._shares: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        # Sums of (|g|/2^k)^p travel beside those of |g|^p, where these may leave float64.
        self.distance = kernels.distance(norm_type) if plan.wide else 0

    def __call__(self, gradients: Gradients, factor: Tensor | None = None) -> Norms:
        sums, _, far = self.power_sums(gradients, factor)
        return self.norms(sums, far)

    def power_sums(
        self,
        gradients: Gradients | None,
        factor: Tensor | None = None,
        beside: Tensor | None = None,
        ready: Tensor | None = None,
        *,
        news: News | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[num_slots] float64, reduced over all ranks: ``Σ|g|^p``, or ``max|g|`` for p = ∞; and what has
        travelled with them, float64: the extra sums of the gradients times ``factor``, then the sums over
        ranks of the numbers ``beside``; and ``Σ(|g|/2^distance)^p`` of the slots, where there is a distance.
        ``ready``: the sums of this rank's gradients, [num_parameters] float64, in place of the gradients
        (where one of those is infinite, so is the far one)."""
        plan, p = self.plan, self._norm_type
        message = far = None
        if ready is not None and ready.numel():
            columns = self._columns_of(range(ready.numel()), ready.device)
            message = self._joined(ready, *columns)
            if self.distance:
                near = kernels.far_power_sums([], p, ready)
                far = self._joined(torch.where(torch.isinf(ready), ready, near), *columns)
        for bucket in gradients.buckets if ready is None and gradients is not None else ():
            sums = kernels.power_sums(bucket.tensors, p, self._accumulate)
            columns = self._columns_of(bucket.parameters, sums.device)  # each element counts 1 / multiplicity
            more = self._joined(sums, *columns).to(plan.device)
            if self.distance:
                farther = self._joined(kernels.far_power_sums(bucket.tensors, p, sums), *columns)
                far = farther.to(plan.device) if far is None else far.add_(farther.to(plan.device))
            if message is None:
                message = more
            else:
                message = torch.maximum(message, more) if math.isinf(p) else message.add_(more)
        if message is None:
            message = torch.zeros(self.slots.size, dtype=torch.float64, device=plan.device)
        parts = [message]
        if self._extra is not None:
            assert gradients is not None
            count, elementwise = self._extra
            extra = torch.zeros(count, dtype=torch.float64, device=plan.device)
            for bucket in gradients.buckets:
                for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
                    unscaled = gradient if factor is None else gradient * factor.to(gradient.device)
                    extra += elementwise(unscaled).to(plan.device) / plan.multiplicities[i]
            parts.append(extra)
        if beside is not None:
            parts.append(beside)
        size = self.slots.size
        if self.distance:
            parts.append(torch.zeros_like(message) if far is None else far)
        message = torch.cat(parts) if len(parts) > 1 else message
        message = reduce_message(message, p, plan.group_name, news=news or News())
        if self.distance:
            return message[:size], message[size:-size], message[-size:]
        return message[:size], message[size:], None

    def clamped(
        self, gradients: Gradients, factor: Tensor | None, coefficients: Tensor, bound: Tensor
    ) -> Tensor:
        """[2] float64, reduced over all ranks: ``Σ min(|c·g|, bound)^p`` of the gradients times ``factor``,
        and how many elements are above the bound. ``coefficients``: [] or [num_slots] float64."""
        plan, p = self.plan, self._norm_type
        sums = torch.zeros(2, dtype=torch.float64, device=plan.device)
        for bucket in gradients.buckets:
            for gradient, i in zip(bucket.tensors, bucket.parameters, strict=True):
                by = coefficients if coefficients.dim() == 0 else coefficients[self.slots.of[i]]
                by = by if factor is None else by * factor.double()
                magnitude = gradient.abs().double().mul_(by.to(gradient.device))
                most = bound.to(gradient.device, torch.float64)
                above = (magnitude > most).sum().double()
                held = magnitude.clamp_(max=most)
                held = held.square_() if p == 2 else held.pow_(p)
                sums += torch.stack([held.sum(), above]).to(plan.device) / plan.multiplicities[i]
        return reduce_message(sums, p, plan.group_name)

    def norms(self, power_sums: Tensor, far: Tensor | None = None) -> Norms:
        return Norms.from_power_sums(power_sums, self._norm_type, self.slots.labels, far, self.distance)

    def _joined(self, sums: Tensor, slot: Tensor, share: Tensor) -> Tensor:
        """[num_slots]: from the sums of gradients, the slot of each and its share, all of one length."""
        if not math.isinf(self._norm_type):
            if self.slots.size == 1:
                return torch.dot(sums, share).unsqueeze(0)
            sums = sums * share
        if self.slots.are_distinct:
            return sums.new_zeros(self.slots.size).index_copy_(0, slot, sums)
        return regroup(sums, slot, self.slots.size, self._norm_type)

    def _columns_of(self, parameters: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        key = (device, tuple(parameters))
        found = self._shares.get(key)
        if found is None:  # another thread may drop it at any time: it is never looked up twice
            if len(self._shares) >= 64:  # gradients that come and go: keep the memory bounded
                self._shares.clear()
            shares = [1.0 / self.plan.multiplicities[i] for i in parameters]
            found = self._shares[key] = on_device(shares, torch.float64, device)
        return self.slots.index(key[1], device), found
